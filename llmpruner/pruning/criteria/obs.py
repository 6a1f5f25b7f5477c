"""The criterion of Optimal Brain Surgeon. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ...component import ComponentSettings
from ...engine.signals import ParameterSignals, Signal, UnitAxis
from ...structure.coupling import Role
from .base import ImportanceCriterion

if TYPE_CHECKING:
    import torch


class OptimalBrainSurgeon(ImportanceCriterion):
    """Units are removed one after another, each time the one whose removal increases the squared error of the output
    least, with a least-squares update of the other weights. A unit's score is the accumulated error after its removal
    (`llmpruner.pruning.criteria.removal` has the equations; Hassibi and Stork, 1993; SlimGPT, Ling et al., 2024)."""

    name = "obs"
    summary = "greedy removal of units with a least-squares update of the others (OBS on the Gram matrix, SlimGPT)"
    needs = frozenset({Signal.WEIGHT, Signal.GRAM})
    roles = frozenset({Role.CONSUMES})

    class Settings(ComponentSettings):
        ridge: float = Field(
            0.01, gt=0, description="λ, added to the diagonal of the Gram matrix, as a share of the diagonal's mean."
        )

    settings: Settings

    def saliency(self, signals: ParameterSignals) -> torch.Tensor:
        """For units that are not columns (experts, layers): ``W²·E[x²]``, the error without an update of other
        weights."""
        if signals.inputs is None:
            return signals.weight.new_zeros(signals.weight.shape)
        return signals.weight.square() * signals.inputs.second_moment

    def score_units(self, signals: ParameterSignals, axis: UnitAxis, index_UK: torch.Tensor) -> torch.Tensor | None:
        inputs = signals.inputs
        if axis.role is None or inputs is None or inputs.gram is None or axis.axis != inputs.axis:
            return None
        weight = signals.weight if axis.axis == signals.weight.dim() - 1 else signals.weight.mT
        weight, gram = (t if t.dim() == 3 else t[None] for t in (weight, inputs.gram))
        from .removal import remove_all

        return remove_all(weight, gram, index_UK, self.settings.ridge)
