"""A training never leaves a model with a higher loss than it began with."""

from __future__ import annotations

import pytest
import torch
from recovery_cases import pruned_model

from llmpruner import RecoveryStrategy, TrainingResult, fit
from llmpruner.recovery.losses import next_token_loss
from llmpruner.recovery.training import filled_in
from llmpruner.report.history import no_better
from llmpruner.settings import RecoverSettings


def away(model, batch):
    """A loss whose gradient leads to higher values of it."""
    loss = next_token_loss(model, batch)
    return -loss if torch.is_grad_enabled() else loss


class Worse(RecoveryStrategy):
    name = "worse"

    def train(self, job):
        job.model.requires_grad_(True)
        return TrainingResult(job.model, fit(job.model, job, away), 1)


@pytest.mark.parametrize("validation", [0.02, 0])
def test_a_result_that_is_no_better_has_the_weights_of_the_start(tiny, validation):
    model, graph = pruned_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = tiny(Worse(), (model, graph), validation=validation)
    record = result.details
    assert record["best_step"] == 0 and record["validation"][-1]["loss"] > record["validation"][0]["loss"]
    assert record["held_out"] == bool(validation)
    assert "no better than before" in no_better(record)
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_few_steps_of_all_weights_have_a_lower_rate():
    settings = RecoverSettings(data="a", max_steps=12)
    assert filled_in(settings, 50, adapters=False).learning_rate == pytest.approx(1.2e-5)
    assert filled_in(settings, 50, adapters=True).learning_rate == 1e-4
    assert filled_in(RecoverSettings(data="a", max_steps=300), 50, adapters=False).learning_rate == 1e-4
    named = settings.model_copy(update={"learning_rate": 3e-4})
    assert filled_in(named, 50, adapters=False).learning_rate == 3e-4
