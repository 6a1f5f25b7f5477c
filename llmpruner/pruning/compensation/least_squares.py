"""Ridge regression from sums over tokens, with the ridge chosen on tokens that are held out.

For inputs X (n × in), targets T (n × out) and old weights W₀ (out × in) the fit is

    W = argmin ‖X Wᵀ − T‖² + λ‖W − W₀‖²  =  (TᵀX + λW₀)(XᵀX + λI)⁻¹,

which keeps the old weights in directions of the input space without data. λ is the mean diagonal of XᵀX times one of
`RIDGES`, from 0.001 to 3. Sums over tokens are float32; systems are solved in float64. `WeightFitter` is this
regression, and `BiasFitter` a mean, for one weight matrix; `write_all` applies them to many, divided between processes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite

import torch

from ...engine.products import WatchedProduct
from ...engine.ranks import Ranks
from ...engine.statistics import add_gram, add_product
from ...errors import no_bias
from ...models.devices import doubled, multiplies_bfloat16_fast, of_sums
from .readers import Reader

_LOG = logging.getLogger("llmpruner")

RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
_BLOCK = 1024
"""Inputs at a time for which errors are computed in float64."""
_OUTPUTS = 128
"""The least number of outputs that errors are computed of, where there are more."""
_MASSIVE = 4
"""Times the median norm of tokens; massive activations have hundreds of times."""

Matrix = tuple[str, int | None]
"""Name of a parameter, and the number of the matrix in a stacked one."""


@dataclass(frozen=True)
class Fit:
    """The fit of one weight. ``slot``: number of the expert in a stacked parameter, None for one matrix. ``rows``:
    tokens in the fit. ``ridge``: λ of `compensation.least_squares` as a share of the mean diagonal of XᵀX; None:
    weights are unchanged. ``before``, ``after``: squared error on held-out tokens as a share of the mean square of the
    targets, with the old weights of the inputs that stay and with fitted ones; None where it is not a finite number."""

    parameter: str
    slot: int | None
    rows: int
    ridge: float | None
    before: float | None = None
    after: float | None = None


class WeightFitter:
    """Fits W_K and b (the weight of an input that is always 1) by ridge regression on X_K, the kept inputs of W."""

    trials = len(RIDGES) + 1
    """The number of weights that are compared on the held-out rows: one for each of `RIDGES`, and the old ones."""

    def __init__(self, reader: Reader, matrix: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.matrix, self.bias = matrix, bias
        self.kept = reader.kept.to(matrix.device)
        sizes = len(self.kept) + (bias is not None), matrix.shape[0], matrix.device
        self._fit, self._held_out = _Sums(*sizes), _Sums(*sizes)

    def add(self, use: WatchedProduct, target: torch.Tensor) -> None:
        """``use.inputs``: (tokens, in), removed inputs included. ``target``: (tokens, out), float32. The last eighth of
        the rows of each micro-batch is held out; single rows would be similar to their neighbours in the fit."""
        inputs = use.inputs.index_select(1, self.kept)
        if not (inputs.dtype == torch.bfloat16 and multiplies_bfloat16_fast(inputs.device.type)):
            inputs = inputs.float()
        if self.bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        split = len(inputs) - len(inputs) // 8
        self._fit.add(inputs[:split], target[:split])
        self._held_out.add(inputs[split:], target[split:])

    @property
    def has_rows(self) -> bool:
        """Whether there are rows to fit and to compare; an expert may get none."""
        return bool(self._fit.rows and self._held_out.rows)

    def reduce(self, ranks: Ranks) -> None:
        """Sum over all processes, which must all call this."""
        self._fit.reduce(ranks)
        self._held_out.reduce(ranks)

    def error(self, trial: int) -> float:
        """The error of a trial on the held-out rows, see `_Sums.error`, for `_OUTPUTS` or more evenly spaced outputs.
        Infinite without rows, and for a system that cannot be solved."""
        if not self.has_rows:
            return inf
        old_OI = self._old()
        step = max(1, len(old_OI) // _OUTPUTS)
        old_IO = doubled(old_OI[::step].T)
        weight = _ridge(self._fit, old_IO, RIDGES[trial], step) if trial < len(RIDGES) else old_IO
        error = inf if weight is None else self._held_out.error(weight, step)
        return error if isfinite(error) else inf

    def write(self, key: Matrix, errors: Sequence[float]) -> Fit:
        """Set W_R to zero, and W_K and b to the best fit on all rows if one beats the old weights on held-out rows."""
        before = after = None
        step = max(1, len(self._held_out.squares) // _OUTPUTS)
        whole = float(doubled(self._held_out.squares[::step]).sum()) / max(self._held_out.rows, 1)
        if whole and isfinite(errors[-1]):
            # The best fit is no worse than the old weights. Differences of sums in float32 may fall below zero.
            before, after = max(0.0, 1 + errors[-1] / whole), max(0.0, 1 + min(errors) / whole)
        rows = self._fit.rows + self._held_out.rows
        new = old_OI = self._old()
        ridge: float | None = None
        better = sorted((error, trial) for trial, error in enumerate(errors[:-1]) if error < errors[-1])
        if better:
            self._fit.gram += self._held_out.gram
            self._fit.cross += self._held_out.cross
        for _, trial in better:
            fitted = _ridge(self._fit, doubled(old_OI.T), RIDGES[trial])
            if fitted is not None:
                new, ridge = fitted.T.float().to(old_OI.device), RIDGES[trial]
                break
        if self.bias is not None:
            self.bias.copy_(new[:, -1])
            new = new[:, :-1]
        self.matrix.zero_()
        self.matrix.index_copy_(1, self.kept, new.to(self.matrix.dtype))
        return Fit(*key, rows, ridge, before, after)

    def _old(self) -> torch.Tensor:
        old = self.matrix.index_select(1, self.kept).float()
        return old if self.bias is None else torch.cat([old, self.bias.float()[:, None]], 1)


class BiasFitter:
    """Adds W_R · mean(X_R) to b. Raises `UnsupportedModelError` where there is no bias. Methods: as `WeightFitter`."""

    trials = 0

    def __init__(self, reader: Reader, matrix: torch.Tensor, bias: torch.Tensor | None) -> None:
        if bias is None:
            raise no_bias(reader.parameter)
        self.matrix, self.bias, self.rows = matrix, bias, 0
        self.kept = reader.kept.to(matrix.device)
        self.total = torch.zeros(matrix.shape[1], dtype=torch.float64, device=of_sums(matrix.device))

    def add(self, use: WatchedProduct, target: torch.Tensor) -> None:
        self.total += use.inputs.to(self.total.device).sum(0, dtype=torch.float64)
        self.rows += len(use.inputs)

    def reduce(self, ranks: Ranks) -> None:
        ranks.sum_([self.total])
        self.rows = int(*ranks.totals(self.rows))

    def error(self, trial: int) -> float:
        raise NotImplementedError

    def write(self, key: Matrix, errors: Sequence[float]) -> Fit:
        """Change b, and set W_R to zero. The `Fit` has the number of tokens in the mean."""
        removed = torch.ones(len(self.total), dtype=torch.bool, device=self.matrix.device)
        removed[self.kept] = False
        lost = self.total / max(self.rows, 1) * removed.to(self.total.device)
        self.bias += (doubled(self.matrix) @ lost).to(self.bias)
        self.matrix[:, removed] = 0
        return Fit(*key, self.rows, None)


Fitter = WeightFitter | BiasFitter


def write_all(fitters: Mapping[Matrix, Fitter], ranks: Ranks) -> list[Fit]:
    """`write` of all. The processes share the trials, then the fits, and all get the new weights."""
    for fitter in fitters.values():
        fitter.reduce(ranks)
    every = _errors(list(fitters.values()), ranks)
    written: dict[Matrix, Fit] = {}
    unsolvable: dict[str, None] = {}
    for number, ((key, fitter), of_trials) in enumerate(zip(fitters.items(), every, strict=True)):
        if isinstance(fitter, WeightFitter) and fitter.has_rows and not any(map(isfinite, of_trials[:-1])):
            unsolvable[key[0]] = None
        if ranks.owns(number):
            written[key] = fitter.write(key, of_trials)
    for name in unsolvable if ranks.first else ():
        _LOG.warning(
            f"'{name}' keeps its weights: its least-squares fit can't be solved, with so few tokens and such large "
            "activations; raise --samples or --set prune.length"
        )
    for number, fitter in enumerate(fitters.values()):
        ranks.copy_from(number, [fitter.matrix] if fitter.bias is None else [fitter.matrix, fitter.bias])
    fits = ranks.merged(written)
    return [fits[key] for key in fitters]


def _errors(fitters: Sequence[Fitter], ranks: Ranks) -> list[list[float]]:
    """The `error` of the old weights, and of ridges from the middle one towards the least error, which has one minimum
    over the ridges; infinite for those that were not tried, as solving takes long. The processes share the trials."""
    errors = [[inf] * fitter.trials for fitter in fitters]
    tried = [set[int]() for _ in fitters]
    while True:
        tasks = []
        for number, (of_fitter, done) in enumerate(zip(errors, tried, strict=True)):
            ridges = range(len(of_fitter) - 1)
            best = min(ridges, key=of_fitter.__getitem__) if done else len(ridges) // 2
            # Where none can be solved, all are tried.
            near = ridges if done and of_fitter[best] == inf else {best - 1, best, best + 1}.intersection(ridges)
            tasks += [(number, trial) for trial in sorted({*near, *range(len(of_fitter))[-1:]} - done)]
            done.update(near, range(len(of_fitter))[-1:])
        if not tasks:
            return errors
        found = torch.zeros(len(tasks), dtype=torch.float64)
        for place, (number, trial) in enumerate(tasks):
            if ranks.owns(place):
                found[place] = fitters[number].error(trial)
        ranks.sum_([found])
        for (number, trial), error in zip(tasks, found.tolist(), strict=True):
            errors[number][trial] = error


class _Sums:
    """``gram``: XᵀX (in × in), lower triangle; ``cross``: XᵀT (in × out); ``squares``: of T, (out,); ``rows``: n."""

    def __init__(self, width: int, out: int, device: torch.device) -> None:
        self.gram = torch.zeros(width, width, device=device)
        self.cross = torch.zeros(width, out, device=device)
        self.squares, self.rows = torch.zeros(out, device=device), 0

    def reduce(self, ranks: Ranks) -> None:
        ranks.sum_([self.gram, self.cross, self.squares])
        self.rows = int(*ranks.totals(self.rows))

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """``inputs``: in float32, or in bfloat16, whose products are rounded. Beside the ridge, that is little, but not
        for the few tokens with massive activations: their rounding would exceed what all others add, so that they are
        added in float32."""
        parts = [(inputs, targets)]
        if inputs.dtype == torch.bfloat16:
            massive = _is_massive(inputs) | _is_massive(targets)
            parts = [(inputs[~massive], targets[~massive]), (inputs[massive].float(), targets[massive])]
        for inputs_NI, targets_NO in parts:
            add_gram(self.gram, inputs_NI)
            add_product(self.cross, inputs_NI.T, targets_NO.to(inputs_NI.dtype))
        self.squares += targets.square().sum(0)
        self.rows += len(inputs)

    def error(self, weight_IO: torch.Tensor, step: int) -> float:
        """Mean squared error over the rows, summed over every ``step``-th output, of which ``weight_IO`` is; less the
        mean square of T, which is the same for all weights. A block of inputs at a time is in its dtype."""
        total, width = 0.0, len(self.gram)
        for start in range(0, width, _BLOCK):
            rows = slice(start, start + _BLOCK)
            # The rows of the symmetric matrix: left of the diagonal as they are, right of it from the columns.
            full = self.gram[rows].tril(start)
            full[:, start:] += self.gram[start:, rows].tril(-1).mT
            product = full.to(weight_IO) @ weight_IO
            product -= 2 * self.cross[rows, ::step].to(weight_IO)
            total += float((product * weight_IO[rows]).sum())
        return total / max(self.rows, 1)


def _is_massive(rows: torch.Tensor) -> torch.Tensor:
    """Which of the rows (N, …) have a norm far above that of most (Sun et al., "Massive Activations", 2024)."""
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    massive: torch.Tensor = norms > _MASSIVE * norms.median()
    return massive


def _ridge(sums: _Sums, old_IO: torch.Tensor, ridge: float, step: int = 1) -> torch.Tensor | None:
    """The fit (in, out), float64, of every ``step``-th output. None where XᵀX + λI, rounded, has no Cholesky factor."""
    gram = doubled(sums.gram)
    strength = ridge * float(gram.diagonal().mean())
    # Where all inputs are always zero, λ is zero too; the smallest float32 keeps the system solvable.
    gram.diagonal().add_(max(strength, torch.finfo(torch.float32).tiny))
    # In place, as these are the largest tensors of a compensation: LAPACK stores columns, so that of rows the transpose
    # is given. Reads and writes the lower triangle alone.
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(gram.mT, upper=True, out=(gram.mT, failed))
    if failed:
        return None
    targets = doubled(sums.cross[:, ::step]).add_(old_IO, alpha=strength)
    torch.linalg.solve_triangular(gram, targets, upper=False, out=targets)
    torch.linalg.solve_triangular(gram.mT, targets, upper=True, out=targets)
    return targets
