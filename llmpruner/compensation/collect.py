"""What is collected about one weight matrix while the calibration text goes by, and what is written in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import UnsupportedModelError
from .consumers import Consumer, matrix_of
from .least_squares import NormalEquations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..engine.watch import WatchedProduct


class Refit:
    """The normal equations of one weight matrix, with a column of ones where the product adds a bias."""

    def __init__(self, consumer: Consumer, use: WatchedProduct) -> None:
        self.consumer = consumer
        self.bias = use.bias
        self.kept = consumer.kept.to(use.inputs.device)
        width = len(self.kept) + (use.bias is not None)
        self.equations = NormalEquations(width, use.outputs.shape[1], use.inputs.device)

    def add(self, use: WatchedProduct, target: torch.Tensor) -> None:
        inputs = use.inputs.index_select(1, self.kept).float()
        if self.bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        self.equations.add(inputs, target)

    def write(self, model: PreTrainedModel, slot: int | None) -> tuple[int, float | None]:
        """Put the fitted weights where the old ones were, with zeros for the inputs that go."""
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


class MeanLoss:
    """The mean of what cut inputs said, which a bias can say in their place."""

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
        """Move the mean into the bias, and set the weights of the inputs that go to zero."""
        matrix = matrix_of(model, self.consumer, slot)
        lost = self.total / max(self.rows, 1)
        lost[self.consumer.kept.to(lost.device)] = 0
        self.bias += (matrix.double() @ lost).to(self.bias.dtype)
        stays = torch.zeros(matrix.shape[1], dtype=torch.bool, device=matrix.device)
        stays[self.consumer.kept.to(matrix.device)] = True
        matrix[:, ~stays] = 0
        return self.rows, None
