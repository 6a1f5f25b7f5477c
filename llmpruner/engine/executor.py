"""What a stage runs a decoder with: where its weights come from, and where hidden states are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.meta import decoder_list
from ..models.weights import Weights
from .boundaries import DEFAULT_LIMIT, Boundaries
from .ranks import SINGLE, Ranks

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


TOKENS_AT_ONCE = 4096
"""Tokens of a micro-batch in a walk forwards, at least one sample."""
TOKENS_WITH_GRADIENTS = 1024
"""The same in a walk with gradients, which keeps what is computed inside a layer."""


@dataclass(frozen=True)
class Executor:
    """``divided``: micro-batches are this many times smaller than usual, which changes results by rounding.
    ``boundary_memory``: bytes of hidden states in memory; those beyond are in a file in ``folder`` (None: the
    system's folder of temporary files). ``ranks``: the processes that the calibration text is spread over."""

    weights: Weights
    boundary_memory: int | None = DEFAULT_LIMIT
    folder: Path | None = None
    divided: int = 1
    ranks: Ranks = SINGLE

    @classmethod
    def of(cls, model: PreTrainedModel, path: str, ranks: Ranks = SINGLE) -> Executor:
        """For a model in memory. ``path``: of its module list of decoder layers."""
        return cls(Weights(model, path), ranks=ranks)

    @property
    def model(self) -> PreTrainedModel:
        return self.weights.model

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers. Raises `UnsupportedModelError` where they are not a list."""
        return decoder_list(self.weights.model, self.weights.path)

    def rows_forward(self, length: int) -> int:
        """Samples of ``length`` tokens in a micro-batch of a walk forwards."""
        return max(1, TOKENS_AT_ONCE // self.divided // length)

    def rows_backward(self, length: int) -> int:
        """The same in a walk with gradients."""
        return max(1, TOKENS_WITH_GRADIENTS // self.divided // length)

    def boundaries(self) -> Boundaries:
        return Boundaries(self.boundary_memory, self.folder)
