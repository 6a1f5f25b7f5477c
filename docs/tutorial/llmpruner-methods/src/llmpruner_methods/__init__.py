from llmpruner import ImportanceCriterion, RecoveryStrategy, Role, Signal, TrainingResult, hookimpl


class RmsTaylor(ImportanceCriterion):
    name = "rms-taylor"
    summary = "root mean square over the samples of what removing a weight does to the loss, |w|·√E[g²]"
    needs = frozenset({Signal.WEIGHT, Signal.GRAD_SQ})

    def saliency(self, signals):
        return signals.weight.abs() * signals.grad_sq.sqrt()


class Consumers(RecoveryStrategy):
    name = "consumers"
    summary = "trains the projections that read what was cut, and nothing else"

    def train(self, job):
        from llmpruner import fit  # brings torch along, so not before training begins

        inside = [group for group in job.graph.groups if group.layer is not None]
        chosen = {span.parameter for group in inside for span in group.spans_with(Role.CONSUMES)}
        for name, parameter in job.model.named_parameters():
            parameter.requires_grad_(name in chosen)
        losses = fit(job.model, job)
        trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
        return TrainingResult(job.model, losses, trained)


@hookimpl
def llmpruner_importance_criteria():
    return [RmsTaylor]


@hookimpl
def llmpruner_recovery_strategies():
    return [Consumers]
