"""Fitters: accumulate sums over the calibration tokens for one weight matrix, and compute its new values.

X (tokens × in) are the inputs of the matrix W (out × in) and b (out,) its bias; K are the kept inputs, R the removed
ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import UnsupportedModelError
from .consumers import Consumer, matrix_of
from .least_squares import NormalEquations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..engine.watch import WatchedProduct


class WeightFitter:
    """Fits W_K and b to targets by ridge regression on X_K; b is the weight of an additional input that is always 1.

    ``use``: a product with the matrix, for its sizes, device and bias.
    """

    def __init__(self, consumer: Consumer, use: WatchedProduct) -> None:
        self.consumer = consumer
        self.bias = use.bias
        self.kept = consumer.kept.to(use.inputs.device)
        width = len(self.kept) + (use.bias is not None)
        self.equations = NormalEquations(width, use.outputs.shape[1], use.inputs.device)

    def add(self, use: WatchedProduct, target: torch.Tensor) -> None:
        """``use.inputs``: (tokens, in), removed inputs included. ``target``: (tokens, out), float32."""
        inputs = use.inputs.index_select(1, self.kept).float()
        if self.bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        self.equations.add(inputs, target)

    def write(self, model: PreTrainedModel, slot: int | None) -> tuple[int, float | None]:
        """Replace W_K and b in ``model`` (of expert ``slot``) by the fitted values and W_R by zeros. Returns the number
        of tokens in the fit, and the ridge (None where the old values fit better)."""
        matrix = matrix_of(model, self.consumer, slot)
        old = matrix.index_select(1, self.kept).float()
        if self.bias is not None:
            old = torch.cat([old, self.bias.float()[:, None]], 1)
        new, ridge = self.equations.solve(old)
        if self.bias is not None:
            self.bias.copy_(new[:, -1])
            new = new[:, :-1]
        matrix.zero_()
        matrix.index_copy_(1, self.kept, new.to(matrix.dtype))
        return self.equations.rows, ridge


class BiasFitter:
    """Adds W_R · mean(X_R) to b. Raises `UnsupportedModelError` where there is no bias. Methods: as `WeightFitter`."""

    def __init__(self, consumer: Consumer, use: WatchedProduct) -> None:
        if use.bias is None:
            raise UnsupportedModelError(
                f"'{consumer.parameter}' has no bias to compensate with; use --compensate refit or none"
            )
        self.consumer, self.bias, self.rows = consumer, use.bias, 0
        self.total = torch.zeros(use.inputs.shape[1], dtype=torch.float64, device=use.inputs.device)

    def add(self, use: WatchedProduct, target: torch.Tensor) -> None:
        del target
        self.total += use.inputs.sum(0, dtype=torch.float64)
        self.rows += len(use.inputs)

    def write(self, model: PreTrainedModel, slot: int | None) -> tuple[int, float | None]:
        """Change b in ``model``, and set W_R to zero. Returns the number of tokens in the mean, and None."""
        matrix = matrix_of(model, self.consumer, slot)
        lost = self.total / max(self.rows, 1)
        lost[self.consumer.kept.to(lost.device)] = 0
        self.bias += (matrix.double() @ lost).to(self.bias.dtype)
        stays = torch.zeros(matrix.shape[1], dtype=torch.bool, device=matrix.device)
        stays[self.consumer.kept.to(matrix.device)] = True
        matrix[:, ~stays] = 0
        return self.rows, None
