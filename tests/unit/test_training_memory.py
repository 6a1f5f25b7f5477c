"""What a training of a whole model needs: said before its weights are read, and refused where the machine has less."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
from said import Said
from transformers.trainer_utils import rotate_checkpoints

import llmpruner
from llmpruner import Catalog, SettingsError
from llmpruner.plugins.manager import plugin_manager
from llmpruner.recipes.jobs import recover_job
from llmpruner.recipes.training_memory import training_forecast
from llmpruner.recovery.memory import training_bytes
from llmpruner.recovery.trainer import LossTrainer
from llmpruner.settings import LoadSettings, RecoverSettings


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    tiny_models.llama().save_pretrained(folder / "dense")
    tiny_models.tokenizer().save_pretrained(folder / "dense")
    llmpruner.prune(str(folder / "dense"), output=folder / "pruned", ratio=0.2, importance="l1", compensate="none")
    rows = [{"prompt": f"{number}? ", "completion": "Paris."} for number in range(8)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def recover(home, output, **options):
    return llmpruner.recover(
        str(home / "pruned"),
        data=str(home / "data.jsonl"),
        output=output,
        max_steps=1,
        batch_size=4,
        cutoff=64,
        **options,
    )


def test_what_is_needed_is_said_first(home, tmp_path):
    said = Said()
    recover(home, tmp_path / "out", strategy="full", progress=said)
    assert said.lines[0].startswith("needs about ") and " of memory, " in said.lines[0] and " of disk" in said.lines[0]


def test_too_little_memory_is_refused_before_weights_are_read(home, tmp_path, monkeypatch):
    small = SimpleNamespace(total=1 << 20, available=1 << 20)
    monkeypatch.setattr("psutil.virtual_memory", lambda: small)
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(total=0))
    monkeypatch.setattr("llmpruner.recipes.opening.Opener.weights", lambda *_, **__: pytest.fail("loaded"))
    message = r"with recovery strategy distil needs about .* of memory .* this machine has 1 MiB; --strategy local"
    with pytest.raises(SettingsError, match=message):
        recover(home, tmp_path / "out", strategy="distil")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_16_bits_are_counted_as_they_are_trained(home):
    """In bytes for each weight, besides what does not depend on their number."""
    catalog, job = Catalog(plugin_manager()), {"data": str(home / "data.jsonl"), "max_steps": 1}

    def needs(dtype, **options):
        opened = llmpruner.load(str(home / "pruned"), dtype=dtype)
        found = recover_job(RecoverSettings(**job, **options), catalog)
        needed = training_forecast(found, opened, None, LoadSettings(dtype=dtype), catalog)
        parts = {name: size / opened.graph.total_parameters for name, size in needed.stages[-1].memory.items()}
        return {name: size for name, size in parts.items() if name.split()[0] in ("weights", "gradients")}, needed.disk

    narrow = {"strategy": "full", "settings": {"full": {"float32": False}}}
    moments = "gradients and moments of AdamW"
    (whole, disk), (half, less) = needs("bfloat16", strategy="full"), needs("bfloat16", **narrow)
    assert whole == {"weights": 2, moments: 12, "weights in float32": 2, "weights in bfloat16": 2}
    assert half == {"weights": 2, moments: 6} and disk > 1.8 * less
    assert needs("float16", strategy="full")[0] == {"weights": 2, moments: 12, "weights in float32": 2}
    assert needs("float32", strategy="full")[0] == needs("float32", **narrow)[0] == {"weights": 4, moments: 12}
    assert needs("bfloat16", strategy="lora")[0] == {"weights": 2, moments: 0}
    assert needs("bfloat16", strategy="lora", autocast=True)[0] == {"weights": 2, moments: 0}


def test_weights_that_a_validation_keeps_take_disk(home):
    catalog, opened = Catalog(plugin_manager()), llmpruner.load(str(home / "pruned"))

    def disk(**options):
        job = recover_job(RecoverSettings(data=str(home / "data.jsonl"), strategy="full", **options), catalog)
        return training_forecast(job, opened, None, LoadSettings(), catalog).disk

    assert disk() == disk(validation_data="more.jsonl") == disk(validation=0) + 2 * 4 * opened.graph.total_parameters


def test_a_checkpoint_is_written_while_two_others_lie_there(home, tmp_path, monkeypatch):
    lying: list[int] = []

    def watched(output_dir, **options):
        lying.append(sum(file.stat().st_size for file in Path(output_dir).glob("checkpoint-*/*")))
        rotate_checkpoints(output_dir, **options)

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", watched)
    monkeypatch.setattr("llmpruner.recovery.trainer.saving_steps", lambda total: 1)
    monkeypatch.setattr(LossTrainer, "worth_saving", lambda self: True)
    catalog, opened = Catalog(plugin_manager()), llmpruner.load(str(home / "pruned"))
    settings = {"data": str(home / "data.jsonl"), "strategy": "full", "validation": 0, "max_steps": 5, "batch_size": 2}
    job = recover_job(RecoverSettings(**settings), catalog)
    llmpruner.recover(str(home / "pruned"), output=tmp_path / "out", **settings)
    result = 4 * opened.graph.total_parameters
    # Beside the tensors, each has the states of the generators and of the schedule.
    assert 0.8 * max(lying) < training_forecast(job, opened, None, LoadSettings(), catalog).disk - result


@pytest.mark.parametrize("strategy", ["lora", "full", "distil"])
def test_parameters_with_gradients(strategy, home):
    graph, catalog = llmpruner.load(str(home / "pruned")).graph, Catalog(plugin_manager())
    found = catalog.create(catalog.strategies, strategy).trained_parameters(graph)
    assert found == (0 if strategy == "lora" else graph.total_parameters)


def test_values_of_a_micro_batch():
    settings = RecoverSettings(data="a", batch_size=8, micro_batch_size=4, cutoff=512)
    whole, half = (
        training_bytes(settings.model_copy(update={"autocast": autocast}), 49152, 576, 30, 4)
        for autocast in (False, True)
    )
    assert whole["logits"] == half["logits"] == 3 * 2048 * 49152 * 4
    assert whole["values for the backward pass"] == 2 * half["values for the backward pass"] == 2048 * 576 * 30 * 34 * 2
