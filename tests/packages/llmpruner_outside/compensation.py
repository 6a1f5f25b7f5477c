"""Weights that read removed units grow until their norm is what it was."""

from pydantic import Field

from llmpruner import Compensation, ComponentSettings, Role


class KeepNorm(Compensation):
    name = "keep-norm"
    summary = "scales the weights that read removed units to their norm before the cut"
    reads_text = False

    class Settings(ComponentSettings):
        share: float = Field(1.0, ge=0, le=1, description="How much of the lost norm is made good.")

    settings: Settings

    def repair(self, task):
        for name, units in task.kept.items():
            for span in task.graph.by_name[name].spans_with(Role.CONSUMES):
                weight = task.model.get_parameter(span.parameter)
                kept = weight[(slice(None),) * span.axis + (span.indices(units),)].norm()
                weight.mul_(1 + self.settings.share * (weight.norm() / kept - 1))
        return ()
