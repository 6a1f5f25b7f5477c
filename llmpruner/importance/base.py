"""ImportanceCriterion: how much each weight matters, seen one parameter at a time."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from ..errors import UnknownNameError

if TYPE_CHECKING:
    import torch


class Signal(str, Enum):
    """What a criterion can ask to see of each parameter."""

    WEIGHT = "weight"
    GRAD = "grad"
    """Gradient of the mean next-token loss over the calibration set."""
    GRAD_SQ = "grad_sq"
    """Mean over the samples of the squared per-sample gradient (the empirical Fisher diagonal)."""


@dataclass(frozen=True, slots=True)
class ParameterSignals:
    """One parameter as a criterion sees it; every tensor has the parameter's shape, in float32."""

    weight: torch.Tensor
    grad: torch.Tensor | None
    grad_sq: torch.Tensor | None
    generator: torch.Generator
    """Seeded by the run's seed and the parameter's name; for criteria that draw random numbers."""


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
