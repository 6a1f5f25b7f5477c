"""Refit: weights that read removed units are fitted again by least squares. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from ..component import ComponentSettings
from .base import Compensation, Repaired, RepairTask


class Refit(Compensation):
    """Fits every weight matrix that loses inputs again, with its bias where it has one, on the kept inputs, by ridge
    regression against the dense model (`llmpruner.compensation.least_squares`). Layers are fitted in order, each on the
    outputs of compensated layers (`llmpruner.compensation.repair`)."""

    name = "refit"
    summary = "weights that read removed units are fitted again by least squares against the dense model"
    by_layer = True
    changes_readers_alone = True
    ranks_again = True

    class Settings(ComponentSettings):
        mix: float = Field(
            0.5,
            ge=0,
            le=1,
            description="Target of each fit: 0 is the output of the uncut layer in the pruned model; 1 also adds the "
            "whole difference of the hidden states from the dense model's.",
        )

    settings: Settings

    def repair(self, task: RepairTask) -> Repaired:
        from . import fitters, repair

        return repair.repair(task, fitters.WeightFitter, mix=self.settings.mix)
