"""What a walk through a model can measure of each parameter and layer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Signal(str, Enum):
    """What a criterion can ask to see of each parameter."""

    WEIGHT = "weight"
    """The parameter itself."""
    GRAD = "grad"
    """Gradient of the mean next-token loss over the calibration set."""
    GRAD_SQ = "grad_sq"
    """Mean over the samples of the squared per-sample gradient (the empirical Fisher diagonal)."""
    INPUT_STATS = "input_stats"
    """Mean and mean square of what a weight matrix is multiplied with."""
    GRAM = "gram"
    """Mean outer product of what a weight matrix is multiplied with."""
    STREAM = "stream"
    """How a whole layer turns the residual stream; seen by `ImportanceCriterion.score_layer` only."""


@dataclass(frozen=True, slots=True)
class InputStats:
    """What a weight matrix is multiplied with, averaged over all calibration tokens (an expert sees a zero for every
    token that is not given to it). ``mean`` and ``power`` (mean square) broadcast against the weight: size 1 on the
    axes that are not summed over."""

    mean: torch.Tensor
    power: torch.Tensor
    axis: int
    """The axis of the weight that the inputs run along."""
    gram: torch.Tensor | None = None
    """(…, in, in), with the leading axes of a stack of matrices."""

    @property
    def variance(self) -> torch.Tensor:
        """Mean square less the square of the mean, shaped like them; rounding never makes it negative."""
        return (self.power - self.mean.square()).clamp_min(0)


@dataclass(frozen=True, slots=True)
class StreamStats:
    """The residual stream before and after a layer, averaged over all calibration tokens."""

    cosine: float
    """Mean cosine between a token's hidden states before and after."""
    angle: float
    """Mean angle between them, in units of π."""


@dataclass(frozen=True, slots=True)
class ParameterSignals:
    """One parameter as a criterion sees it; ``weight`` and gradients have its shape, in float32."""

    weight: torch.Tensor
    grad: torch.Tensor | None
    grad_sq: torch.Tensor | None
    generator: torch.Generator
    """Seeded by the run's seed and the parameter's name; for criteria that draw random numbers."""
    inputs: InputStats | None = None
    """None too for a parameter of the decoder that is no matrix, and for all outside it."""
