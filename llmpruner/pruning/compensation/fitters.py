"""Fitters: accumulate sums over the calibration tokens for one weight matrix, and compute its new values.

X (tokens × in) are the inputs of the matrix W (out × in) and b (out,) its bias; K are the kept inputs, R the removed
ones.
"""

from __future__ import annotations

import logging
from math import isfinite
from typing import TYPE_CHECKING

import torch

from .base import Fit
from .biases import no_bias
from .consumers import Consumer, matrix_of
from .least_squares import NormalEquations
from .rows import ALIKE, Rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

    from ...engine.products import WatchedProduct
    from ...engine.ranks import Ranks

_LOG = logging.getLogger("llmpruner")

Values = tuple[int, float | None, float | None, float | None, float | None]
"""``rows``, ``ridge``, ``before``, ``after`` and ``mix`` of a `Fit`."""


class WeightFitter:
    """Fits W_K and b to targets by ridge regression on X_K; b is the weight of an additional input that is always 1.

    ``matrix``: W, a view of the parameter. ``bias``: b, None where there is none. ``mixed``: whether the share of
    ``toward`` in the targets is chosen too.
    """

    trials = NormalEquations.trials
    """The number of errors that `write` compares."""

    def __init__(
        self, consumer: Consumer, matrix: torch.Tensor, bias: torch.Tensor | None, *, mixed: bool = False
    ) -> None:
        self.consumer, self.bias = consumer, bias
        self.kept = consumer.kept.to(matrix.device)
        width = len(self.kept) + (bias is not None)
        self.equations = NormalEquations(width, matrix.shape[0], matrix.device, mixed=mixed)

    def add(
        self, use: WatchedProduct, target: torch.Tensor, rows: Rows = ALIKE, toward: torch.Tensor | None = None
    ) -> None:
        """``use.inputs``: (tokens, in), removed inputs included. ``target``, ``toward``: (tokens, out), float32."""
        inputs = use.inputs.index_select(1, self.kept).float()
        if self.bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        self.equations.add(inputs, target, rows, toward)

    def reduce(self, ranks: Ranks) -> None:
        """Sum over all processes, which must all call this."""
        self.equations.reduce(ranks)

    def error(self, trial: int, matrix: torch.Tensor) -> float:
        """Number ``trial`` of the errors that `write` compares."""
        return self.equations.error(trial, self._old(matrix))

    def write(self, matrix: torch.Tensor, errors: Sequence[float]) -> Values:
        """Replace W_K and b by the fitted values and W_R by zeros."""
        shares = self.equations.shares(errors) or (None, None)
        new, ridge, mix = self.equations.solve(self._old(matrix), errors)
        if self.bias is not None:
            self.bias.copy_(new[:, -1])
            new = new[:, :-1]
        matrix.zero_()
        matrix.index_copy_(1, self.kept, new.to(matrix.dtype))
        return self.equations.rows, ridge, *shares, mix

    def _old(self, matrix: torch.Tensor) -> torch.Tensor:
        old = matrix.index_select(1, self.kept).float()
        return old if self.bias is None else torch.cat([old, self.bias.float()[:, None]], 1)


class BiasFitter:
    """Adds W_R · mean(X_R) to b. Raises `UnsupportedModelError` where there is no bias. Methods: as `WeightFitter`."""

    trials = 0

    def __init__(
        self, consumer: Consumer, matrix: torch.Tensor, bias: torch.Tensor | None, *, mixed: bool = False
    ) -> None:
        del mixed
        if bias is None:
            raise no_bias(consumer.parameter)
        self.consumer, self.bias, self.rows = consumer, bias, 0
        self.total = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)

    def add(
        self, use: WatchedProduct, target: torch.Tensor, rows: Rows = ALIKE, toward: torch.Tensor | None = None
    ) -> None:
        del target, rows, toward
        self.total += use.inputs.sum(0, dtype=torch.float64)
        self.rows += len(use.inputs)

    def reduce(self, ranks: Ranks) -> None:
        ranks.sum_([self.total])
        self.rows = int(*ranks.totals(self.rows))

    def error(self, trial: int, matrix: torch.Tensor) -> float:
        raise NotImplementedError

    def write(self, matrix: torch.Tensor, errors: Sequence[float]) -> Values:
        """Change b, and set W_R to zero. ``rows`` are the tokens in the mean."""
        del errors
        lost = self.total / max(self.rows, 1)
        lost[self.consumer.kept.to(lost.device)] = 0
        self.bias += (matrix.double() @ lost).to(self.bias.dtype)
        stays = torch.zeros(matrix.shape[1], dtype=torch.bool, device=matrix.device)
        stays[self.consumer.kept.to(matrix.device)] = True
        matrix[:, ~stays] = 0
        return self.rows, None, None, None, None


Fitter = WeightFitter | BiasFitter
Matrix = tuple[str, int | None]
"""Name of a parameter, and the number of the matrix in a stacked one."""


def write_all(fitters: Mapping[Matrix, Fitter], model: PreTrainedModel, ranks: Ranks) -> list[Fit]:
    """`write` of all, in place. ``ranks``: the processes that added rows, each to fitters of the same matrices; errors,
    and then the fits of different matrices, are computed by different ones, and all get the new weights."""
    matrices = {key: matrix_of(model, fitter.consumer, key[1]) for key, fitter in fitters.items()}
    for fitter in fitters.values():
        fitter.reduce(ranks)
    tasks = [(key, trial) for key, fitter in fitters.items() for trial in range(fitter.trials)]
    errors = torch.zeros(len(tasks), dtype=torch.float64)
    for number, (key, trial) in enumerate(tasks):
        if ranks.owns(number):
            errors[number] = fitters[key].error(trial, matrices[key])
    ranks.sum_([errors])
    of_matrix: dict[Matrix, list[float]] = {key: [] for key in fitters}
    for (key, _), error in zip(tasks, errors.tolist(), strict=True):
        of_matrix[key].append(error)
    if ranks.first:
        _say_unsolvable(fitters, of_matrix)
    own: dict[Matrix, Fit] = {}
    for number, (key, fitter) in enumerate(fitters.items()):
        if ranks.owns(number):
            rows, ridge, before, after, mix = fitter.write(matrices[key], of_matrix[key])
            own[key] = Fit(*key, rows, ridge, before, after, mix)
    for number, (key, fitter) in enumerate(fitters.items()):
        ranks.copy_from(number, [matrices[key]] if fitter.bias is None else [matrices[key], fitter.bias])
    fits = ranks.merged(own)
    return [fits[key] for key in fitters]


def _say_unsolvable(fitters: Mapping[Matrix, Fitter], errors: Mapping[Matrix, Sequence[float]]) -> None:
    """Name the weights that stay because no ridge can be solved."""
    unsolvable = {
        name: None
        for (name, slot), fitter in fitters.items()
        if isinstance(fitter, WeightFitter)
        and fitter.equations.comparable
        and not any(map(isfinite, errors[name, slot][:-1]))
    }
    for name in unsolvable:
        _LOG.warning(
            "'%s' keeps its weights: its least-squares fit can't be solved, with so few tokens and such large "
            "activations; raise --samples or --length",
            name,
        )
