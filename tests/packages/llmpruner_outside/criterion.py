"""Magnitude to a power."""

from pydantic import Field

from llmpruner import ComponentSettings, ImportanceCriterion


class Magnitude(ImportanceCriterion):
    name = "magnitude"
    summary = "sum of |w| to a power"

    class Settings(ComponentSettings):
        power: float = Field(1.0, gt=0, description="The power.")

    settings: Settings

    def saliency(self, signals):
        return signals.weight.abs() ** self.settings.power
