"""Ridge regression from sums over tokens, with the ridge chosen on tokens that are held out.

For inputs X (n × in), targets T (n × out) and old weights W₀ (out × in) the fit is

    W = argmin ‖X Wᵀ − T‖² + λ‖W − W₀‖²  =  (TᵀX + λW₀)(XᵀX + λI)⁻¹,

which keeps the old weights in directions of the input space without data. λ is the mean diagonal of XᵀX times one of
`RIDGES`, from 0.001 to 3. With weights of the rows, X and T are multiplied by their roots. Sums over tokens are
float32; systems are solved in float64.

The targets may be T + m · D with m, one of `MIXES` (0, 0.25, 0.5, 0.75 and 1), chosen like λ. All fits are compared by
their error to T + D, so that m < 1 is chosen where a fit to less of D comes nearer to T + D on other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import TYPE_CHECKING

import torch

from ...engine.statistics import add_gram
from .rows import ALIKE, Rows

if TYPE_CHECKING:
    from ...engine.ranks import Ranks

RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)
_HELD_OUT = 8
_BLOCK = 1024
"""Inputs at a time for which errors are computed in float64."""
_OUTPUTS = 128
"""The least number of outputs that errors are computed of, where there are more."""


@dataclass
class _Sums:
    """``gram``: XᵀX (in × in), lower triangle only; ``cross``: XᵀT (in × out); ``toward``: XᵀD (in × out), None where
    the targets are T; ``squares``: the squares of T + D, summed over the rows (out,); ``rows``: n."""

    gram: torch.Tensor
    cross: torch.Tensor
    toward: torch.Tensor | None
    squares: torch.Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, width: int, out: int, device: torch.device, *, mixed: bool) -> _Sums:
        gram, cross = torch.zeros(width, width, device=device), torch.zeros(width, out, device=device)
        return cls(gram, cross, torch.zeros_like(cross) if mixed else None, torch.zeros(out, device=device))

    def reduce(self, ranks: Ranks) -> None:
        ranks.sum_([self.gram, self.cross, *([] if self.toward is None else [self.toward]), self.squares])
        self.rows = int(*ranks.totals(self.rows))

    def add(self, inputs: torch.Tensor, targets: torch.Tensor, toward: torch.Tensor | None) -> None:
        add_gram(self.gram, inputs)
        self.cross.addmm_(inputs.T, targets)
        if self.toward is not None and toward is not None:
            self.toward.addmm_(inputs.T, toward)
            targets = targets + toward
        self.squares += targets.square().sum(0)
        self.rows += len(inputs)

    def join(self, other: _Sums) -> None:
        """Add the sums of XᵀX, XᵀT and XᵀD of other rows."""
        self.gram += other.gram
        self.cross += other.cross
        if self.toward is not None and other.toward is not None:
            self.toward += other.toward

    def mean_square(self, step: int) -> float:
        """Mean square of T + D, summed over every ``step``-th output."""
        return float(self.squares[::step].double().sum()) / max(self.rows, 1)

    def error(self, weight_IO: torch.Tensor, step: int) -> float:
        """Squared error of the fit, summed over the outputs and averaged over the rows, less the mean square of T + D,
        which is the same for all weights. ``weight_IO``: of every ``step``-th output. A block of inputs at a time is in
        its dtype."""
        found, width = 0.0, len(self.gram)
        for start in range(0, width, _BLOCK):
            rows = slice(start, start + _BLOCK)
            # The rows of the symmetric matrix: left of the diagonal as they are, right of it from the columns.
            full = self.gram[rows].tril(start)
            full[:, start:] += self.gram[start:, rows].tril(-1).mT
            product = full.to(weight_IO.dtype) @ weight_IO
            product -= 2 * self.cross[rows, ::step].to(weight_IO.dtype)
            if self.toward is not None:
                product -= 2 * self.toward[rows, ::step].to(weight_IO.dtype)
            found += float((product * weight_IO[rows]).sum())
        return found / max(self.rows, 1)


class NormalEquations:
    """Sums over rows of inputs and targets; one row in eight is held out until the ridge is chosen. Where the text has
    several sources, its two sides (`compensation.rows`) are held out in turn, and their errors averaged.

    ``width``, ``out``: the numbers of inputs and outputs. ``mixed``: whether m is chosen too. Memory:
    2 · width · (width + out) float32, with ``mixed`` 2 · width · (width + 2 · out).

    Several processes that add rows `reduce` their sums, and may each compute the `error` of some trials.
    """

    trials = len(RIDGES) + 1
    """The number of weights that are compared on the held-out rows: one for each of `RIDGES`, and the old ones."""

    def __init__(self, width: int, out: int, device: torch.device, *, mixed: bool = False) -> None:
        self._fit = _Sums.zeros(width, out, device, mixed=mixed)
        self._held = _Sums.zeros(width, out, device, mixed=mixed)
        self._mixes = MIXES if mixed else (0.0,)
        self._sides = False

    @property
    def rows(self) -> int:
        return self._fit.rows + self._held.rows

    @property
    def comparable(self) -> bool:
        """Whether there are rows to fit to and rows to compare fits on."""
        return self._fit.rows > 0 and self._held.rows > 0

    def add(
        self, inputs: torch.Tensor, targets: torch.Tensor, rows: Rows = ALIKE, toward: torch.Tensor | None = None
    ) -> None:
        """Add ``inputs`` (n, in), ``targets`` T (n, out) and ``toward`` D (n, out), None for zero. With one source, the
        last eighth of the rows of each call is held out; single rows would be similar to their neighbours in the fit.
        With several processes the same rows are held out, as each call has the rows of a whole micro-batch (see
        `Ranks`)."""
        inputs, targets = rows.weighted(inputs), rows.weighted(targets)
        toward = None if toward is None else rows.weighted(toward)
        split = len(inputs) - len(inputs) // _HELD_OUT
        first: slice | torch.Tensor = slice(split)
        second: slice | torch.Tensor = slice(split, None)
        if rows.second is not None:
            self._sides, first, second = True, ~rows.second, rows.second
        for sums, part in ((self._fit, first), (self._held, second)):
            sums.add(inputs[part], targets[part], None if toward is None else toward[part])

    def reduce(self, ranks: Ranks) -> None:
        """Sum over all processes, which must all call this."""
        self._fit.reduce(ranks)
        self._held.reduce(ranks)
        self._sides = any(ranks.totals(self._sides))

    def error(self, trial: int, old_OI: torch.Tensor) -> float:
        """The error on the held-out rows in trial number ``trial``, see `_Sums.error`, with the best of the `MIXES`;
        with two sides, the mean of their errors, each as a share of the mean square of its targets. Infinite where
        there are no rows. Where there are many outputs, it is that of `_OUTPUTS` evenly spaced ones or a few more,
        which are enough to choose a ridge."""
        if not self.comparable:
            return inf
        return min(self._errors(trial, old_OI))

    def _errors(self, trial: int, old_OI: torch.Tensor) -> list[float]:
        """The errors of a trial, one for each mix; one for the old weights."""
        step = max(1, len(old_OI) // _OUTPUTS)
        old = old_OI[::step].T.double()

        def on(held: _Sums, fitted: _Sums) -> list[float]:
            # As a list, so that the factor is freed before the errors are computed.
            weights = [*_ridge(fitted, old, RIDGES[trial], self._mixes, step)] if trial < len(RIDGES) else [old]
            errors = [held.error(weight, step) for weight in weights] or [inf] * len(self._mixes)
            return [error if isfinite(error) else inf for error in errors]

        if not self._sides:
            return on(self._held, self._fit)
        both = on(self._held, self._fit), on(self._fit, self._held)
        # Where all targets are zero, so is the share of any error.
        squares = [sums.mean_square(step) or inf for sums in (self._held, self._fit)]
        return [(one / squares[0] + other / squares[1]) / 2 for one, other in zip(*both, strict=True)]

    def shares(self, errors: Sequence[float]) -> tuple[float, float] | None:
        """The squared errors on the held-out rows of the old weights and of the best fit (that is not worse), as shares
        of the mean square of the targets. ``errors``: of all trials. None without rows, and where all targets are
        zero."""
        whole = self._held.mean_square(max(1, len(self._held.squares) // _OUTPUTS))
        if self._fit.rows == 0 or whole == 0:
            return None
        if self._sides:
            whole = 1.0
        old, best = errors[-1], min(errors)
        # Differences of sums in float32 may fall below zero.
        return max(0.0, 1 + old / whole), max(0.0, 1 + best / whole)

    def solve(
        self, old_OI: torch.Tensor, errors: Sequence[float] | None = None
    ) -> tuple[torch.Tensor, float | None, float | None]:
        """New weights (out, in), float32, fitted on all rows, their ridge, and m, None where it is not chosen; the old
        weights and None where no fit gives a smaller error on the held-out rows. ``errors``: of all trials, where they
        are known."""
        if errors is None:
            errors = [self.error(trial, old_OI) for trial in range(self.trials)]
        better = sorted((error, trial) for trial, error in enumerate(errors[:-1]) if error < errors[-1])
        if not better:
            return old_OI.float(), None, None
        mix = self._mixes[0]
        if len(self._mixes) > 1:
            of_mixes = self._errors(better[0][1], old_OI)
            mix = self._mixes[of_mixes.index(min(of_mixes))]
        self._fit.join(self._held)
        for _, trial in better:
            for new in _ridge(self._fit, old_OI.T.double(), RIDGES[trial], (mix,)):
                return new.T.float(), RIDGES[trial], mix if len(self._mixes) > 1 else None
        return old_OI.float(), None, None


def solve_bytes(width: int, out: int) -> int:
    """Memory that `NormalEquations.solve` takes beside the sums, with its argument: in float64 the old and the new
    weights, and the factor of the Gram matrix; or, for an error, two sets of weights and the products of a block."""
    block, tried = min(width, _BLOCK), _tried(out)
    solving = 8 * width**2 + 20 * width * out
    products = block * (4 * width + 8 * tried + max(8 * width, 16 * tried))
    return max(solving, 20 * width * tried + products)


def solve_operations(
    width: int, out: int, *, holds_out_sources: bool = False, mixed: bool = False
) -> tuple[float, float]:
    """Operations in float64 of `NormalEquations.solve`: those of the factors, and of products and triangular systems
    (multiply and add: two). ``holds_out_sources``: whether sources of the text are held out in turn; ``mixed``: whether
    the target is chosen."""
    trials = len(RIDGES) * (2 if holds_out_sources else 1)
    solved = trials * (len(MIXES) if mixed else 1)
    products = (solved + solved + 1) * _tried(out) + out
    return (trials + 1) * width**3 / 3, products * 2 * width**2


def _tried(out: int) -> int:
    """The number of outputs that errors are computed of."""
    return -(-out // max(1, out // _OUTPUTS))


def _ridge(
    sums: _Sums, old_IO: torch.Tensor, ridge: float, mixes: Sequence[float], step: int = 1
) -> Iterator[torch.Tensor]:
    """The fits (in, out), float64, for one ridge and each of ``mixes``. None where XᵀX + λI has no Cholesky factor:
    rounded sums in float32 have negative eigenvalues. ``old_IO``: of every ``step``-th output, which alone are
    fitted."""
    gram = sums.gram.double()
    strength = ridge * float(gram.diagonal().mean())
    # Where all inputs are always zero, λ is zero too; the smallest float32 keeps the system solvable.
    gram.diagonal().add_(max(strength, torch.finfo(torch.float32).tiny))
    # In place, as these are the largest tensors of a compensation: LAPACK stores columns, so that of rows the transpose
    # is given. Reads and writes the lower triangle alone.
    _, failed = torch.linalg.cholesky_ex(
        gram.mT, upper=True, out=(gram.mT, torch.empty((), dtype=torch.int32, device=gram.device))
    )
    if failed:
        return
    for mix in mixes:
        targets = sums.cross[:, ::step].double().add_(old_IO, alpha=strength)
        if sums.toward is not None:
            targets.add_(sums.toward[:, ::step], alpha=mix)
        torch.linalg.solve_triangular(gram, targets, upper=False, out=targets)
        yield torch.linalg.solve_triangular(gram.mT, targets, upper=True, out=targets)
