from pydantic import Field

from llmpruner import (
    ComponentSettings,
    ImportanceCriterion,
    RecoveryStrategy,
    Role,
    Signal,
    hookimpl,
)


class RmsTaylor(ImportanceCriterion):
    name = "rms-taylor"
    summary = "root mean square over the samples of the change of the loss without a weight, |w|·√E[g²], to a power"
    needs = frozenset({Signal.WEIGHT, Signal.GRAD_SQ})

    class Settings(ComponentSettings):
        power: float = Field(1.0, gt=0, description="The power; above 1, single large weights count more.")

    settings: Settings

    def saliency(self, signals):
        return (signals.weight.abs() * signals.grad_sq.sqrt()) ** self.settings.power


class Consumers(RecoveryStrategy):
    name = "consumers"
    summary = "trains the projections that consume units that can be removed, and nothing else"

    class Settings(ComponentSettings):
        producers: bool = Field(False, description="Train the projections that produce such units, too.")

    settings: Settings

    def train(self, job):
        from llmpruner import fit  # imports torch, so not before training begins

        roles = (Role.CONSUMES, Role.PRODUCES) if self.settings.producers else (Role.CONSUMES,)
        inside = [group for group in job.graph.groups if group.layer is not None]
        chosen = {span.parameter for group in inside for span in group.spans_with(*roles)}
        for name, parameter in job.model.named_parameters():
            parameter.requires_grad_(name in chosen)
        return fit(job.model, job)


@hookimpl
def llmpruner_importance_criteria():
    return [RmsTaylor]


@hookimpl
def llmpruner_recovery_strategies():
    return [Consumers]
