"""A training never leaves a model with a higher loss than it began with."""

from __future__ import annotations

import pytest
import torch
from recovery_cases import pruned_model, train_tiny

from llmpruner import RecoveryStrategy, fit
from llmpruner.recovery import training
from llmpruner.recovery.losses import next_token_loss
from llmpruner.recovery.strategies import FullStrategy, LoraStrategy
from llmpruner.recovery.training import filled_in
from llmpruner.report.sections import first_and_last, no_better
from llmpruner.settings import RecoverSettings


def away(model, batch):
    """A loss whose gradient leads to higher values of it."""
    loss = next_token_loss(model, batch)
    return -loss if torch.is_grad_enabled() else loss


def lucky():
    """A loss that after a step is lower by 0.3 on one row, and higher by 0.2 on another."""
    changes = []

    def loss(model, batch):
        value = next_token_loss(model, batch)
        if torch.is_grad_enabled():
            changes[:] = [0.2, -0.3]
            return value
        return value * 0 + 2 + (changes.pop() if changes else 0)

    return loss


class With(RecoveryStrategy):
    name = "with"

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def train(self, job):
        job.model.requires_grad_(True)
        return fit(job.model, job, self.loss)


@pytest.mark.parametrize(
    ("loss", "options"), [(away, {}), (away, {"validation": 0}), (away, {"max_steps": 1}), (lucky(), {"max_steps": 1})]
)
def test_a_result_that_is_no_better_has_the_weights_of_the_start(tiny, loss, options):
    model, graph = pruned_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = tiny(With(loss), (model, graph), **options)
    record = result.record
    first, *_, last = record["validation"]
    assert record["best_step"] == 0 and record["improved"] is False
    assert last["loss"] + last["error"] > first["loss"] and (last["loss"] < first["loss"]) == (loss is not away)
    assert record["held_out"] == (options.get("validation") != 0)
    assert "no better than before" in no_better(record) and first_and_last(record)[2] == first["loss"]
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_weights_of_the_start_are_found_in_a_folder_that_was_moved(tmp_path):
    """Between an interruption and the rest of the training."""

    def interrupt(step, *_):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "before", With(away), on_step=interrupt)
    (tmp_path / "before").rename(tmp_path / "after")
    result = train_tiny(tmp_path / "after", With(away))
    assert result.record["best_step"] == 0 and len(result.losses) == 6
    for name, value in pruned_model()[0].state_dict().items():
        assert torch.equal(result.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("base", "dtype", "rate"),
    [(FullStrategy, torch.float32, 1e-4), (FullStrategy, torch.bfloat16, 1e-4), (LoraStrategy, torch.bfloat16, 5e-3)],
)
def test_the_loss_is_that_of_the_weights_as_they_are_saved(tiny, monkeypatch, base, dtype, rate):
    """At a rate of which bfloat16 keeps little, and where merging adapters rounds."""
    monkeypatch.setattr(training, "computes_bfloat16_fast", lambda model: False)
    rows = []

    class Kept(base):
        def train(self, job):
            rows.extend(job.validation)
            return super().train(job)

    result = tiny(Kept(), pruned_model(dtype), learning_rate=rate, max_steps=3)
    assert result.record["best_step"] > 0 and {p.dtype for p in result.model.parameters()} == {dtype}
    # Weights that are trained are in float32, under autocast.
    widened = base is FullStrategy and dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=widened):
        model, total = result.model.float() if widened else result.model, 0.0
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
            total += float(next_token_loss(model, batch)) * (ids.numel() - 1)
    mean = total / sum(len(row["input_ids"]) - 1 for row in rows)
    assert first_and_last(result.record)[2] == pytest.approx(mean, abs=1e-6)


def test_the_rate_of_all_weights_is_lower_for_wide_models_and_few_steps():
    def rate(adapters=False, width=1500, **given):
        return filled_in(RecoverSettings(data="a", **given), 50, adapters=adapters, width=width).learning_rate

    assert rate(max_steps=300) == pytest.approx(1e-4) and rate(max_steps=300, width=3000) == pytest.approx(5e-5)
    assert rate(max_steps=12) == pytest.approx(1.2e-5) and rate(max_steps=12, adapters=True) == 1e-4
    assert rate(max_steps=12, minutes=1.0) == pytest.approx(1e-4), "the schedule lowers it"
    assert rate(max_steps=12, learning_rate=3e-4) == 3e-4
