"""A training in a given time: how many steps it has, and that a continued one has as many."""

from __future__ import annotations

import json
import math
import time

import pytest
import tiny_models
import torch
from test_recovery_validation import EXAMPLES, FAMILY, SETTINGS, run

from llmpruner import SettingsError, UnsupportedModelError
from llmpruner.discovery.groups import build_graph
from llmpruner.recovery import pace, schedule
from llmpruner.recovery.base import RecoveryJob
from llmpruner.recovery.examples import tokenise
from llmpruner.recovery.full import FullStrategy
from llmpruner.recovery.memory import needed, recomputing
from llmpruner.recovery.pace import Pace, paced
from llmpruner.recovery.schedule import steps, with_batch, worth_saving
from llmpruner.recovery.trainer import LossTrainer
from llmpruner.recovery.training import fit
from llmpruner.settings import RecoverSettings

TIMED = SETTINGS.model_copy(update={"max_steps": None, "minutes": 1.0, "eval_steps": None, "warmup_steps": None})


def fixed(seconds, monkeypatch):
    """Steps of four examples take so many seconds."""
    made = []

    def timed(model, job, loss):
        made.append(1)
        return Pace(seconds / 4, 0.0, 0.0, 0.0, len(job.validation))

    monkeypatch.setattr(pace, "_timed", timed)
    return made


@pytest.mark.parametrize("rows", [0, 20])
def test_as_many_steps_as_fit(rows):
    settings = RecoverSettings(data="a", batch_size=4, minutes=1)
    found = Pace(0.1, 0.1, 1.0, 0.25, rows)
    for seconds in (0.4, 1, 7, 60, 61.3, 600):
        count = found.count(seconds, settings)
        assert found.seconds(count + 1, settings) > seconds
        assert count == 0 or found.seconds(count, settings) <= seconds
    assert Pace(0.125, 0.0, 0.0, 0.0).count(60, settings) == 120


def test_saving_takes_a_small_share_of_the_time():
    settings = RecoverSettings(data="a", batch_size=4, minutes=1)
    assert Pace(0.1, 0.1, 0.0, 0.25).seconds(120, settings) == 60 + 10 * 0.25
    assert Pace(0.1, 0.1, 0.0, 6.0).seconds(120, settings) == 60 + 6 + 60 / 30
    assert Pace(0.1, 0.1, 0.0, 6.0).seconds(10, settings) == pytest.approx(5 + 6 + 5 / 30)
    assert worth_saving(0.25, 0.0) and worth_saving(6.0, 180.0) and not worth_saving(6.0, 179.0)


@pytest.mark.parametrize(
    ("epochs", "examples", "size"),
    [(2, 50_000, 64), (2, 6_400, 64), (2, 6_300, 32), (2, 1_000, 8), (0.5, 900, 2), (2, 30, 2)],
)
def test_the_batch_leaves_200_steps(epochs, examples, size):
    settings = RecoverSettings(data="a", epochs=epochs)
    chosen = with_batch(settings, lambda one: steps(one, examples), 1)
    assert chosen.batch_size == size and (steps(chosen, examples) >= 200 or size == 2)
    assert with_batch(settings, lambda one: steps(one, examples), 4).batch_size == max(size, 4)
    assert with_batch(settings, lambda one: steps(one, examples), 3) is settings
    given = RecoverSettings(data="a", epochs=epochs, batch_size=64)
    assert with_batch(given, lambda one: steps(one, examples), 1) is given


def test_the_batch_that_was_chosen_is_trained_with_and_recorded(tmp_path):
    """Without it, an epoch of these few rows would be one step."""
    given = {name: value for name, value in SETTINGS.given().items() if name not in ("batch_size", "max_steps")}
    result = run(tmp_path, FullStrategy(), RecoverSettings(**given | {"epochs": 1.0, "validation": 0}))
    assert result.settings.batch_size == result.record()["settings"]["batch_size"] == 2
    assert len(result.losses) == math.ceil(result.examples / 2) > 1
    bounded = RecoverSettings(**given | {"max_steps": 3})
    assert with_batch(bounded, lambda one: 3, 1) is bounded


def test_the_batch_of_a_training_with_minutes_is_recorded(tmp_path, monkeypatch):
    fixed(0.01, monkeypatch)
    given = {name: value for name, value in TIMED.given().items() if name != "batch_size"}
    settings = RecoverSettings(**given | {"minutes": 0.03, "micro_batch_size": 4})
    result = run(tmp_path, FullStrategy(), settings)
    assert result.settings.batch_size == json.loads((tmp_path / "pace.json").read_text())["batch_size"] < 64
    assert result.settings.max_steps is None


def test_a_state_that_takes_long_to_save_is_saved_less_often(tmp_path, monkeypatch):
    saved, save = [], LossTrainer._save_checkpoint

    def spy(trainer, *arguments):
        saved.append(trainer.state.global_step)
        save(trainer, *arguments)

    monkeypatch.setattr(LossTrainer, "_save_checkpoint", spy)
    settings = SETTINGS.model_copy(update={"max_steps": 6})
    run(tmp_path / "often", FullStrategy(), settings)
    assert saved == [1, 2, 3, 4, 5]
    saved.clear()
    monkeypatch.setattr(schedule, "_CHEAP_SAVING", 0.0)
    monkeypatch.setattr(schedule, "_SAVING_SHARE", 1e-9)
    run(tmp_path / "seldom", FullStrategy(), settings)
    assert saved == [1]


def test_the_schedule_is_that_of_the_steps_that_fit(tmp_path, monkeypatch):
    fixed(0.0582 * 60 / 7, monkeypatch)
    result = run(tmp_path, FullStrategy(), TIMED.model_copy(update={"minutes": 0.06, "schedule": "cosine"}))
    total = len(result.losses)
    assert json.loads((tmp_path / "pace.json").read_text())["steps"] == total in (6, 7)
    state = json.loads(next(iter(sorted(tmp_path.glob("checkpoint-*")))).joinpath("trainer_state.json").read_text())
    rates = [entry["learning_rate"] / 5e-3 for entry in state["log_history"] if "loss" in entry]
    assert rates == pytest.approx([(1 + math.cos(math.pi * n / total)) / 2 for n in range(len(rates))])


def test_a_continued_training_has_the_same_number_of_steps(tmp_path, monkeypatch):
    settings = TIMED.model_copy(update={"minutes": 0.06})
    fixed(0.5, monkeypatch)
    whole = run(tmp_path / "whole", FullStrategy(), settings)

    def interrupt(step, *_):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", FullStrategy(), settings, on_step=interrupt)
    slower = fixed(2.0, monkeypatch)
    resumed = run(tmp_path / "parts", FullStrategy(), settings)
    assert not slower
    assert resumed.losses == whole.losses and len(whole.losses) in (5, 6)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)


def test_max_steps_is_a_bound(tmp_path, monkeypatch):
    fixed(0.001, monkeypatch)
    assert len(run(tmp_path, FullStrategy(), TIMED.model_copy(update={"max_steps": 3})).losses) == 3


def test_too_little_time_is_refused(tmp_path, monkeypatch):
    fixed(100.0, monkeypatch)
    with pytest.raises(SettingsError, match=r"--minutes 1 does not suffice: .* the shortest training takes 100\.0 s"):
        run(tmp_path, FullStrategy(), TIMED)


def slow_loss(model, batch):
    """Takes most of its time whatever else the machine does."""
    time.sleep(0.1)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:])


@pytest.mark.slow
def test_a_trial_leaves_no_trace_and_the_training_ends_in_time(tmp_path):
    """The losses are those of a training of as many steps without a trial."""
    model = tiny_models.llama()
    rows = tokenise(EXAMPLES, tiny_models.tokenizer(), cutoff=48, loss_on="all")
    settings = TIMED.model_copy(update={"minutes": 3 / 60, "validation": 0})
    graph = build_graph(FAMILY, model.config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    began = time.monotonic()
    job = RecoveryJob(model, tiny_models.tokenizer(), rows, graph, settings, tmp_path / "a")
    count = paced(model, job, slow_loss).settings.max_steps
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert not (tmp_path / "a" / "trial").exists()
    losses = fit(model, job, slow_loss)
    # A step has two micro-batches of at least 100 ms, of which little is computation.
    assert 5 <= len(losses) == count <= 14
    assert 1.0 < time.monotonic() - began < 4.5
    fixed = settings.model_copy(update={"minutes": None, "max_steps": count})
    other = tiny_models.llama()
    again = RecoveryJob(other, tiny_models.tokenizer(), rows, graph, fixed, tmp_path / "b")
    assert fit(other, again, slow_loss) == losses


@pytest.mark.parametrize(("enough", "steps"), [(0.0, 2), (60.0, 4)])
def test_long_steps_are_timed_once(enough, steps, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "_ENOUGH", enough)
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch["input_ids"]))
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.square().mean()

    model = tiny_models.llama()
    rows = tokenise(EXAMPLES, tiny_models.tokenizer(), cutoff=48, loss_on="all")
    settings = TIMED.model_copy(update={"validation": 0})
    graph = build_graph(FAMILY, model.config)
    found = paced(model, RecoveryJob(model, tiny_models.tokenizer(), rows, graph, settings, tmp_path), loss)
    assert sizes == [settings.micro_batch_size] * steps
    assert json.loads((tmp_path / "pace.json").read_text())["seconds"]["saving"] > 0
    assert found.settings.max_steps > 0 and found.settings.batch_size == settings.batch_size


def checkpointed(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, monkeypatch):
    found = {}
    for switch in ("off", "on"):
        settings = SETTINGS.model_copy(update={"gradient_checkpointing": switch, "max_steps": 2})
        result = run(tmp_path / switch, FullStrategy(), settings)
        found[switch] = result.losses
        assert not checkpointed(result.model)
    assert found["on"] == pytest.approx(found["off"], abs=1e-6)
    model = tiny_models.llama()
    job = RecoveryJob(model, tiny_models.tokenizer(), [], build_graph(FAMILY, model.config), SETTINGS, tmp_path)
    with recomputing(model, job) as on:
        assert not on
    for free, expected in ((needed(model, job), True), (2 * needed(model, job), False)):
        monkeypatch.setattr("llmpruner.recovery.memory.free_bytes", lambda device, free=free: free)
        with recomputing(model, job) as on:
            assert on == checkpointed(model) == expected


def test_a_model_without_gradient_checkpointing_is_named(monkeypatch, tmp_path):
    model = tiny_models.llama()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    graph = build_graph(FAMILY, model.config)
    for switch in ("auto", "on"):
        settings = SETTINGS.model_copy(update={"gradient_checkpointing": switch})
        job = RecoveryJob(model, tiny_models.tokenizer(), [], graph, settings, tmp_path)
        if switch == "auto":
            with recomputing(model, job) as on:
                assert not on
            continue
        with pytest.raises(UnsupportedModelError, match="has no gradient checkpointing"), recomputing(model, job):
            pass
