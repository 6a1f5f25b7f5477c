"""ImportanceCriterion: how much each weight matters, seen one parameter at a time."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from ..coupling import Role
from ..errors import UnknownNameError

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


class ImportanceCriterion:
    """Gives every weight a saliency; the core sums it over what each unit owns.

    A complete criterion, as a plugin would write it::

        class Magnitude(ImportanceCriterion):
            name = "magnitude"
            summary = "sum of absolute weights"
            needs = frozenset({Signal.WEIGHT})

            def saliency(self, signals):
                return signals.weight.abs()

    A criterion never sees module names: spans say what belongs to a unit.
    """

    name: ClassVar[str] = ""
    """What ``--importance`` takes; lower case, unique over all plugins."""
    summary: ClassVar[str] = ""
    """One line for ``--help`` and ``llmpruner plugins``: the equation in words, and its source."""
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.WEIGHT})
    """What to measure; anything beyond weights needs a calibration set."""
    roles: ClassVar[frozenset[Role] | None] = None
    """Spans that count, by role; None: all. A group that has none of them is scored on all its spans."""
    variants: ClassVar[tuple[str, ...]] = ()
    """What ``--variant`` takes; the first is the default."""

    def __init__(self, variant: str | None = None) -> None:
        if variant is not None and variant not in self.variants:
            raise UnknownNameError(f"variant of criterion {self.name}:", variant, self.variants)
        self.variant = variant or (self.variants[0] if self.variants else None)

    @property
    def signals(self) -> frozenset[Signal]:
        """What this instance needs; override when it depends on the variant."""
        return self.needs

    @property
    def signed(self) -> bool:
        """Whether the saliencies of one index are summed with their sign before the absolute value is taken
        (a first-order change of the loss by a whole row) rather than after."""
        return False

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        """Saliency of every weight, with the shape of the parameter."""
        raise NotImplementedError

    def score_units(self, signals: ParameterSignals, axis: int, index_UK: torch.Tensor) -> torch.Tensor | None:
        """Scores of whole units on one span, where a sum of saliencies does not say it: (units,), or None for the sum.

        ``index_UK``: the indices on ``axis`` that each unit owns, (units, width).
        """
        del signals, axis, index_UK
        return None

    def score_layer(self, stream: StreamStats) -> float:
        """Score of a whole layer; asked of criteria that need `Signal.STREAM`, which score nothing else."""
        raise NotImplementedError
