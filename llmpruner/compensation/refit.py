"""Refit: weights that read removed units are fitted again by least squares. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from ..component import ComponentSettings
from .base import Compensation, Repaired, RepairTask


class Refit(Compensation):
    """Fits every weight matrix that loses inputs again, on the inputs that it keeps, by ridge regression against the
    dense model (`llmpruner.compensation.least_squares`), with its bias where it has one; layer after layer, each on the
    outputs of the layers before it that were compensated already (`llmpruner.compensation.repair`)."""

    name = "refit"
    summary = "weights that read removed units are fitted again by least squares against the dense model"
    ranks_again = True

    class Settings(ComponentSettings):
        mix: float = Field(
            0.5,
            ge=0,
            le=1,
            description="Target of each fit: 0 keeps what the layer computes from its own input in the pruned model; "
            "1 also adds all that its residual stream differs by from the dense model's.",
        )

    settings: Settings

    def repair(self, task: RepairTask) -> Repaired:
        from .fitters import WeightFitter
        from .repair import repair

        return repair(task, WeightFitter, mix=self.settings.mix)
