"""ImportanceCriterion: how much each weight matters, seen one parameter at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..engine.signals import ParameterSignals, Signal, StreamStats
from ..errors import UnknownNameError
from ..structure.coupling import Role

if TYPE_CHECKING:
    import torch


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
