"""Distillation from a dense model that is read layer by layer, once, before the training."""

from __future__ import annotations

import json
from contextlib import contextmanager, nullcontext

import pytest
import torch
from criteria_cases import make
from safetensors.torch import load_file

from llmpruner import Catalog, LoadSettings, api
from llmpruner.engine.walk import ForwardWalk
from llmpruner.errors import OutputError, UnsupportedModelError
from llmpruner.plugins.manager import plugin_manager
from llmpruner.progress import Progress
from llmpruner.recipes import recovering, training_memory
from llmpruner.recipes.jobs import recover_job
from llmpruner.recovery import kept_targets
from llmpruner.settings import RecoverSettings
from llmpruner.testing.models import letters


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A dense model, pruned, in a folder with a tokenizer; and a file of texts of different lengths."""
    home = tmp_path_factory.mktemp("llama-gqa")
    make("llama-gqa").model.save_pretrained(home / "dense")
    letters().save_pretrained(home / "dense")
    kinds = {"kinds": "mlp,attention", "shape": "free"}
    api.prune(str(home / "dense"), output=home / "pruned", ratio=0.3, importance="l1", compensate="none", **kinds)
    lines = [json.dumps({"text": " ".join("abcdefghij"[n % 7 :: 1 + n % 3]) * (1 + n % 2)}) for n in range(9)]
    (home / "text.jsonl").write_text("\n".join(lines))
    return home


def recover(home, output, *, free, **options):
    """With ``free`` bytes of free memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_memory, "free_bytes", lambda device: free)
        return api.recover(
            str(home / "pruned"), output=output, data=str(home / "text.jsonl"), strategy="distil",
            settings={"distil": {"top": 8, "trains": "touched"}}, max_steps=3, batch_size=4, micro_batch_size=2,
            learning_rate=3e-3, warmup_steps=0, validation=2, **options,
        )  # fmt: skip


def losses(model):
    return json.loads((model / "llmpruner.json").read_text())["recovery"][0]["losses"]


@pytest.fixture
def written(monkeypatch):
    """The targets of the last training, which are removed with its folder."""
    found = {}

    def load(file):
        found.update(load_file(file))
        return load_file(file)

    monkeypatch.setattr(kept_targets, "load_file", load)
    return found


@pytest.fixture
def loads(monkeypatch):
    """Numbers of times that the whole dense model was loaded."""
    count, real = [], recovering.load_dense
    monkeypatch.setattr(recovering, "load_dense", lambda *args, **options: count.append(1) or real(*args, **options))
    return count


def test_the_targets_are_those_of_the_model_in_memory(home, tmp_path, written, loads, monkeypatch):
    sizes = []
    monkeypatch.setattr(kept_targets, "check_space", lambda path, size, what: sizes.append(size))
    recover(home, tmp_path / "whole", free=1 << 40)
    assert len(loads) == 1
    assert sizes == [sum(tensor.nbytes for tensor in written.values())]
    whole = dict(written)
    recover(home, tmp_path / "parts", free=1)
    assert len(loads) == 1, "the dense model was loaded as a whole"
    assert torch.equal(whole["tokens"], written["tokens"])
    torch.testing.assert_close(whole["log_p"], written["log_p"], atol=2e-3, rtol=1e-3)
    whole, parts = (losses(tmp_path / way) for way in ("whole", "parts"))
    assert parts == pytest.approx(whole, abs=1e-3)
    assert not (tmp_path / "parts.recovery").exists()


@pytest.mark.parametrize("free", [1, 1 << 40], ids=["by layer", "in memory"])
def test_too_little_disk_for_them_is_said_before_the_dense_model_runs(home, tmp_path, monkeypatch, free):
    def full(path, size, what):
        raise OutputError(f"no room for {what}")

    monkeypatch.setattr(kept_targets, "check_space", full)
    monkeypatch.setattr(kept_targets, "_by_layer", None)
    monkeypatch.setattr(kept_targets, "_in_memory", None)
    with pytest.raises(OutputError, match="no room for the dense model's most likely tokens"):
        recover(home, tmp_path / "out", free=free)


class Stopping(Progress):
    """Stops when a layer begins."""

    def __init__(self, label):
        self.label = label

    def bar(self, label):
        def at(share, now):
            if now == self.label:
                raise KeyboardInterrupt

        return nullcontext(at)


def test_an_interrupted_run_continues_after_the_layers_that_it_has_run(home, tmp_path, monkeypatch, written):
    recover(home, tmp_path / "whole", free=1)
    whole, ran = dict(written), []
    # A state after every layer, however long writing it takes.
    monkeypatch.setattr("llmpruner.engine.journal.INTERVAL", 0.0)
    monkeypatch.setattr("llmpruner.engine.journal.SHARE", 1e9)
    with pytest.raises(KeyboardInterrupt):
        recover(home, tmp_path / "parts", free=1, progress=Stopping("layer 2"))
    assert list((tmp_path / "parts.recovery" / "predictions").glob("*.states"))
    advance = ForwardWalk.advance
    monkeypatch.setattr(
        ForwardWalk, "advance", lambda walk, number, states: ran.append(number) or advance(walk, number, states)
    )
    recover(home, tmp_path / "parts", free=1)
    assert ran[0] == 2
    assert all(torch.equal(written[name], value) for name, value in whole.items())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


class StoppingInTraining(Progress):
    """Stops after the first step."""

    @contextmanager
    def counter(self, label):
        def at(step, *_):
            raise KeyboardInterrupt

        yield at


def test_targets_that_are_cut_off_are_computed_again(home, tmp_path, written):
    recover(home, tmp_path / "whole", free=1 << 40)
    whole = dict(written)
    with pytest.raises(KeyboardInterrupt):
        recover(home, tmp_path / "parts", free=1 << 40, progress=StoppingInTraining())
    file = tmp_path / "parts.recovery" / kept_targets.TOP_FILE
    file.write_bytes(file.read_bytes()[:-5])
    recover(home, tmp_path / "parts", free=1 << 40)
    assert all(torch.equal(written[name], value) for name, value in whole.items())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_decoder_that_cannot_be_run_by_layers_is_refused_with_what_to_do(home, tmp_path, monkeypatch):
    def fails(*_):
        raise UnsupportedModelError("no")

    monkeypatch.setattr("llmpruner.engine.walk.ForwardWalk.over_batches", fails)
    message = "cannot be run one by one; use --strategy lora or full, or more memory"
    with pytest.raises(UnsupportedModelError, match=message):
        recover(home, tmp_path / "out", free=1)


def test_the_forecast_says_what_is_in_memory(home):
    """Of the whole dense model while it predicts alone, and of one of its layers where it is read from its files."""
    catalog, load = Catalog(plugin_manager()), LoadSettings()
    opened, dense = (api.discover(str(home / name)) for name in ("pruned", "dense"))
    settings = {"data": "a", "strategy": "distil"}
    live, kept = (
        recover_job(RecoverSettings(**settings, settings={"distil": {"top": top}}), catalog) for top in (0, 8)
    )
    whole = training_memory.training_forecast(live, opened, dense, load, catalog)
    first = training_memory.training_forecast(kept, opened, dense, load, catalog)
    parts = training_memory.training_forecast(kept, opened, dense, load, catalog, by_layer=True)
    assert [stage.name for stage in whole.stages] == ["training"]
    assert [stage.name for stage in first.stages] == ["predictions of the dense model", "training"]
    size = dense.graph.total_parameters * 4
    difference = whole.stages[0].memory["weights"] - first.stages[1].memory["weights"]
    assert difference == first.stages[0].memory["weights of the dense model"] == size
    assert 0 < parts.stages[0].memory["layer of the dense model"] < size
