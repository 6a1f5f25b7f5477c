"""A training never leaves a model with a higher loss than it began with."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from recovery_cases import SETTINGS, pruned_model, write_lines

import llmpruner
from llmpruner import RecoveryStrategy, TrainingResult, fit
from llmpruner.cli import main
from llmpruner.recovery.lora import train_adapters
from llmpruner.recovery.losses import next_token_loss
from llmpruner.recovery.strategies import AdapterSettings
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


class WorseAdapters(RecoveryStrategy):
    name = "worse-adapters"

    def train(self, job):
        return train_adapters(job, AdapterSettings(), away)


@pytest.mark.parametrize("validation", [0.02, 0])
@pytest.mark.parametrize("strategy", [Worse(), WorseAdapters()], ids=lambda s: s.name)
def test_a_result_that_is_no_better_has_the_weights_of_the_start(tiny, strategy, validation):
    model, graph = pruned_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = tiny(strategy, (model, graph), validation=validation)
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


def test_the_command_says_so_without_a_tick(tmp_path, monkeypatch, capsys):
    tiny_models.llama().save_pretrained(tmp_path / "dense")
    tiny_models.tokenizer().save_pretrained(tmp_path / "dense")
    data = write_lines(tmp_path / "data.jsonl")
    command = ["recover", tmp_path / "dense", "--strategy", "full", "--data", data, "-o", tmp_path / "out"]
    options = ["--learning-rate", 3, "--max-steps", 3, "--batch-size", SETTINGS["batch_size"], "--cutoff", 24]
    monkeypatch.setattr("sys.argv", ["llmpruner", *map(str, [*command, *options])])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code in (0, None)
    assert "✓" not in said.out + said.err and "no better than before: the loss went from" in said.err
    saved, dense = (llmpruner.load(str(tmp_path / name)).model.state_dict() for name in ("out", "dense"))
    assert all(torch.equal(saved[name], value) for name, value in dense.items())
