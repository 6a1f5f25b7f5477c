"""Training layers one by one: losses by hand, targets after removed layers, models read from files, interruptions."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from criteria_cases import make
from recovery_cases import dense_llama, pruned_copy
from safetensors.torch import load_file

from llmpruner import api
from llmpruner.engine.boundaries import Boundaries
from llmpruner.errors import LlmprunerError, ModelError, OutputError, SettingsError, UnsupportedModelError
from llmpruner.files import tree_bytes
from llmpruner.models.record import OF_THIS_MACHINE
from llmpruner.recipes.forecast import Residency
from llmpruner.recovery.base import LayerWalk, RecoveryJob
from llmpruner.recovery.layerwise import steps_by_layer, used_examples
from llmpruner.recovery.local import LocalStrategy
from llmpruner.settings import RecoverSettings, RunSettings
from llmpruner.testing import RecoveryConformance
from llmpruner.testing.models import letters, pruned_by, small_job

pytestmark = pytest.mark.usefixtures("full_precision")

SETTINGS = RecoverSettings(
    data="here", batch_size=4, micro_batch_size=2, epochs=10, learning_rate=5e-3, warmup_steps=0, cutoff=32
)
ROWS = [
    {"input_ids": [(7 * n + 3 * t) % 60 + 3 for t in range(8 + n)], "labels": [-100] * 3 + [5] * (5 + n)}
    for n in range(7)
]


class TestConformance(RecoveryConformance):
    strategy = LocalStrategy

    def settings(self):
        """A step that is small enough to lower the loss of a layer, which else keeps its weights."""
        return super().settings().model_copy(update={"learning_rate": 5e-4})


class TestConformanceWithDenseInputs(TestConformance):
    strategy = type(
        "Dense", (LocalStrategy,), {"__init__": lambda self, **s: LocalStrategy.__init__(self, inputs="dense", **s)}
    )

    test_an_entry_point_registers_it = None
    test_its_settings_have_defaults_and_descriptions = None


@pytest.fixture
def dense():
    return dense_llama()


@pytest.fixture
def pruned(dense):
    return pruned_copy(dense)


def job_of(pruned, dense, folder, **changes):
    values = {"settings": SETTINGS, "load_teacher": lambda: copy.deepcopy(dense.model), **changes}
    folder.mkdir(exist_ok=True)
    return RecoveryJob(pruned.model, pruned.tokenizer, ROWS, pruned.graph, work_dir=folder, **values)


def after_layers(model, ids):
    """The hidden states before the first layer and after every layer."""
    found = []
    hooks = [
        layer.register_forward_hook(lambda _, args, out: found.append((args[0], out))) for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return [found[0][0], *(out[0] if isinstance(out, tuple) else out for _, out in found)]


def by_hand(pruned, dense, layer, of):
    """The mean over trained tokens of the squared difference after ``layer`` of one and ``of`` of the other model,
    relative to the latter's square."""
    parts = []
    for row in ROWS:
        found, wanted = (
            after_layers(model, row["input_ids"])[n + 1][0, :-1] for model, n in ((pruned, layer), (dense, of))
        )
        trained = torch.tensor(row["labels"][1:]) != -100
        parts.append(((found - wanted).square().sum(-1) / wanted.square().sum(-1))[trained])
    return float(torch.cat(parts).mean())


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
def test_every_layer_comes_nearer_to_the_dense_one(pruned, dense, tmp_path, inputs):
    before = [by_hand(pruned.model, dense.model, n, n) for n in range(3)]
    last = copy.deepcopy(dict(pruned.model.model.layers[2].named_parameters()))
    outside = {n: p.clone() for n, p in pruned.model.named_parameters() if ".layers." not in n}
    result = LocalStrategy(inputs=inputs).train(job_of(pruned, dense, tmp_path))
    layers = result.details["layers"]
    assert [(found["layer"], found["dense_layer"]) for found in layers] == [(0, 0), (1, 1), (2, 2)]
    # The first layer has the embeddings as inputs in either way; the others have trained ones, or the dense ones.
    assert layers[0]["before"] == pytest.approx(before[0], rel=1e-4)
    assert all(found["after"] < 0.9 * found["before"] for found in layers[:2])
    assert all(by_hand(result.model, dense.model, n, n) < before[n] for n in range(3))
    assert [found["restored"] for found in layers] == [False, False, inputs == "dense"]
    if inputs == "pruned":
        assert layers[2]["after"] == pytest.approx(by_hand(result.model, dense.model, 2, 2), rel=1e-4)
    else:
        # The last layer was not cut, so it gives its target already, and steps can only take it away from there.
        assert layers[2]["after"] == layers[2]["before"] < 1e-10
        assert all(torch.equal(p, last[n]) for n, p in result.model.model.layers[2].named_parameters())
        assert result.notes[1] == "training did not lower the error of layers 2; they keep their weights"
    assert len(result.losses) == 3 * 10 * 2
    assert result.trainable_parameters == sum(p.numel() for n, p in result.model.named_parameters() if ".layers." in n)
    assert all(torch.equal(result.model.get_parameter(name), value) for name, value in outside.items())
    assert "relative error of the layers' outputs: mean" in result.notes[0]


def test_examples_of_other_lengths_change_nothing(pruned, dense, tmp_path):
    """Padding, and which examples share a micro-batch, matter by rounding alone."""
    alone, together = (copy.deepcopy(pruned.model) for _ in range(2))
    for name, model, micro in (("alone", alone, 1), ("together", together, 7)):
        settings = SETTINGS.model_copy(update={"batch_size": 7, "micro_batch_size": micro, "epochs": 3})
        job = job_of(replace(pruned, model=model), dense, tmp_path / name, settings=settings)
        LocalStrategy().train(job)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], value, atol=2e-4, rtol=0)


def test_examples_that_no_step_takes_are_not_run(pruned, dense, tmp_path):
    """Six steps are two of each layer, so four of the examples."""
    few = SETTINGS.model_copy(update={"batch_size": 2, "max_steps": 6})
    job = job_of(pruned, dense, tmp_path / "few", settings=few)
    used = used_examples(job)
    assert len(used) == 4 < len(ROWS) and all(row in ROWS for row in used) and used == used_examples(job)
    whole = copy.deepcopy(pruned.model)
    result = LocalStrategy().train(job)
    alone = replace(job_of(replace(pruned, model=whole), dense, tmp_path / "alone", settings=few), examples=used)
    assert result.losses == LocalStrategy().train(alone).losses
    assert used_examples(job_of(pruned, dense, tmp_path)) == list(ROWS)


def test_a_layer_learns_the_removed_layers_after_it(gqa, tmp_path):
    gqa = replace(gqa, tokenizer=letters())
    dense = replace(gqa, model=copy.deepcopy(gqa.model))
    pruned = pruned_by(gqa, small_job(kinds=("layer",), amount=0.25, layers="1"))
    assert len(pruned.model.model.layers) == 3
    before = by_hand(pruned.model, dense.model, 0, 1)
    result = LocalStrategy().train(job_of(pruned, dense, tmp_path, layers=(0, 2, 3)))
    layers = result.details["layers"]
    assert [found["dense_layer"] for found in layers] == [1, 2, 3]
    assert layers[0]["before"] == pytest.approx(before, rel=1e-4)
    assert layers[0]["after"] < 0.9 * before
    assert layers[2]["after"] == pytest.approx(by_hand(result.model, dense.model, 2, 3), rel=1e-3)


def test_steps_are_shared_by_the_layers(pruned, dense, tmp_path):
    assert steps_by_layer(SETTINGS.model_copy(update={"max_steps": 7}), 100, 3) == [3, 2, 2]
    assert steps_by_layer(SETTINGS.model_copy(update={"epochs": 1.5}), 9, 2) == [5, 5]
    before = copy.deepcopy(pruned.model.state_dict())
    settings = SETTINGS.model_copy(update={"max_steps": 2, "learning_rate": 5e-4})
    result = LocalStrategy().train(job_of(pruned, dense, tmp_path, settings=settings))
    assert len(result.losses) == 2 and len(result.details["layers"]) == 2
    changed = {name for name, value in pruned.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[2] for name in changed} <= {"0", "1"} and changed


def test_sixteen_bits_are_trained_in_float32(pruned, dense, tmp_path):
    """Steps far below the precision of bfloat16 add up."""
    settings = SETTINGS.model_copy(update={"learning_rate": 2e-4, "epochs": 20})
    pruned.model.bfloat16()
    result = LocalStrategy().train(job_of(pruned, dense, tmp_path, settings=settings))
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    first = result.details["layers"][0]
    assert first["after"] < 0.95 * first["before"]


def test_what_cannot_be_trained_is_refused(gqa, pruned, dense, tmp_path):
    narrow = replace(gqa, model=copy.deepcopy(gqa.model), tokenizer=letters())
    narrow = pruned_by(narrow, small_job(kinds=("hidden",)))
    with pytest.raises(UnsupportedModelError, match="hidden channels and the dense one 64, so outputs"):
        LocalStrategy().train(job_of(narrow, gqa, tmp_path / "narrow"))
    with pytest.raises(ModelError, match=r"the loss of layer 0 became .* at step"):
        settings = SETTINGS.model_copy(update={"learning_rate": 1e30})
        LocalStrategy().train(job_of(pruned, dense, tmp_path / "diverged", settings=settings))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``folders(name)``: a dense model of `criteria_cases`, pruned in a folder with a tokenizer; and a file of text."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            home = tmp_path_factory.mktemp(name)
            make(name).model.save_pretrained(home / "dense")
            letters().save_pretrained(home / "dense")
            kinds = {} if name == "mixtral" else {"kinds": "mlp,attention", "shape": "free"}
            api.prune(
                str(home / "dense"), output=home / "pruned", ratio=0.3, importance="l1", compensate="none", **kinds
            )
            lines = [json.dumps({"text": " ".join("abcdefghij"[n % 7 :: 1 + n % 3]) * 2}) for n in range(8)]
            (home / "text.jsonl").write_text("\n".join(lines))
            made[name] = home
        return made[name]

    return folder


def recovered(home, output, *, streamed, on_step=None, **settings):
    values = {"strategy": "local", "data": str(home / "text.jsonl"), "epochs": 3, "batch_size": 4, **settings}
    with pytest.MonkeyPatch.context() as patch:
        # Otherwise the size of the free memory decides. Hidden states are in a file.
        patch.setattr(
            "llmpruner.recipes.recovering.arranged_layers",
            lambda *_, **__: Residency(streamed, 0 if streamed else 1 << 20),
        )
        progress = api.QUIET if on_step is None else _Steps(on_step)
        return api.recover(
            str(home / "pruned"), output=output, progress=progress, learning_rate=3e-3, warmup_steps=0,
            micro_batch_size=2, **values,
        )  # fmt: skip


class _Steps(api.Progress):
    def __init__(self, on_step):
        self.on_step = on_step

    def counter(self, label):
        return nullcontext(self.on_step)


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(one, other):
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("name", ["llama-gqa", "mixtral", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_a_model_read_from_its_files_is_trained_alike(name, folders, tmp_path):
    home = folders(name)
    resident = recovered(home, tmp_path / "resident", streamed=False)
    streamed = recovered(home, tmp_path / "streamed", streamed=True)
    assert resident.streamed is None and streamed.streamed is not None
    assert_same(tmp_path / "resident", tmp_path / "streamed")
    before, after = tensors(home / "pruned"), tensors(tmp_path / "streamed")
    assert any(not torch.equal(value, before[key]) for key, value in after.items())
    records = [json.loads((tmp_path / way / "llmpruner.json").read_text()) for way in ("resident", "streamed")]
    assert records[0]["recovery"] == records[1]["recovery"]
    assert len(records[0]["recovery"][0]["layers"]) == len(streamed.model.model.layers)
    # The result that is returned is read from its own files: the folder of the training is gone.
    assert not (tmp_path / "streamed.recovery").exists()
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(streamed.model(ids).logits, resident.model(ids).logits)


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("interval", [0.0, 1e9], ids=["states kept", "states not kept"])
def test_a_killed_run_continues_with_the_same_bytes(streamed, interval, folders, tmp_path, monkeypatch):
    home, seen = folders("llama-gqa"), []
    recovered(home, tmp_path / "whole", streamed=streamed)

    def stop(step, *_):
        seen.append(step)
        if step == 15:
            raise KeyboardInterrupt

    monkeypatch.setattr("llmpruner.engine.journal.INTERVAL", interval)
    with pytest.raises(KeyboardInterrupt):
        recovered(home, tmp_path / "parts", streamed=streamed, on_step=stop)
    assert not (tmp_path / "parts").exists()
    assert bool(list((tmp_path / "parts.recovery" / "layers").glob("*.states"))) == (interval == 0)
    seen.clear()
    recovered(home, tmp_path / "parts", streamed=streamed, on_step=lambda step, *_: seen.append(step))
    assert seen[0] == 13  # Two layers of six steps are finished.
    for file in (tmp_path / "whole").iterdir():
        if file.name in OF_THIS_MACHINE:
            continue
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes(), file.name


def test_one_layer_of_a_model_is_in_memory(folders, tmp_path, monkeypatch):
    home, held = folders("llama-gqa"), set()
    from llmpruner.recovery import layerwise

    train = layerwise._Training._train

    def watched(self, number, *rest):
        for weights in (self.walk.execution.weights, self.dense_walk.execution.weights):
            real = {weights.number(n) for n, p in weights.model.named_parameters() if not p.is_meta}
            held.add((weights is self.weights, len(real)))
        return train(self, number, *rest)

    monkeypatch.setattr(layerwise._Training, "_train", watched)
    recovered(home, tmp_path / "out", streamed=True)
    assert held == {(True, 1), (False, 0)}


def test_memory_decides_how_models_are_held(folders, tmp_path):
    home = folders("llama-gqa")
    options = {"data": str(home / "text.jsonl"), "output": tmp_path / "out", "max_steps": 4}
    with pytest.raises(SettingsError, match="--max-memory has no effect with recovery strategy full"):
        api.recover(str(home / "pruned"), strategy="full", run=RunSettings(max_memory=1 << 40), **options)
    with pytest.raises(
        SettingsError, match=r"--max-memory 1,000 bytes: training .* raise it \(a number without a unit is of bytes"
    ):
        api.recover(str(home / "pruned"), strategy="local", run=RunSettings(max_memory=1000), **options)
    assert list(tmp_path.iterdir()) == []
    found = api.recover(str(home / "pruned"), strategy="local", run=RunSettings(max_memory=1 << 40), **options)
    assert found.streamed is None and len(found.record["recovery"][0]["losses"]) == 4


def test_a_missing_dense_model_is_noticed_before_anything_is_loaded(folders, tmp_path, monkeypatch):
    home = folders("llama-gqa")
    monkeypatch.setattr("llmpruner.recipes.opening.Opener.weights", lambda *_, **__: pytest.fail("loaded"))
    for strategy in ("local", "distil"):
        with pytest.raises(ModelError, match="was not pruned by llmpruner, so no dense model is known"):
            api.recover(str(home / "dense"), strategy=strategy, data=str(home / "text.jsonl"), output=tmp_path / "out")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="strategy local runs in one process"):
        api.recover(str(home / "pruned"), strategy="local", data=str(home / "text.jsonl"), output=tmp_path / "out")


def test_a_result_that_is_read_from_its_files_can_be_trained_further(folders, tmp_path):
    home = folders("llama-gqa")
    once = recovered(home, tmp_path / "once", streamed=True)
    options = {"data": str(home / "text.jsonl"), "max_steps": 4, "strategy": "local"}
    twice = api.recover(once, output=tmp_path / "twice", **options)
    assert twice.streamed is not None and len(twice.record["recovery"]) == 2
    again = api.recover(str(tmp_path / "once"), output=tmp_path / "again", **options)
    assert again.streamed is None
    assert_same(tmp_path / "twice", tmp_path / "again")
    with pytest.raises(ModelError, match="is read layer by layer; pass its folder"):
        api.recover(once, output=tmp_path / "other", data=str(home / "text.jsonl"), max_steps=1)
    with pytest.raises(SettingsError, match="max_memory has no effect"):
        api.recover(once, output=tmp_path / "other", run=RunSettings(max_memory=1 << 40), **options)


def test_what_cannot_be_trained_is_refused_before_it_is_loaded(folders, tmp_path, monkeypatch):
    home = folders("llama-gqa")
    how = {"ratio": 0.1, "importance": "l1", "kinds": "hidden", "compensate": "none"}
    api.prune(str(home / "dense"), output=tmp_path / "narrow", **how)
    monkeypatch.setattr("llmpruner.recipes.opening.Opener.weights", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UnsupportedModelError, match="hidden channels were removed, so outputs"):
        api.recover(str(tmp_path / "narrow"), strategy="local", data=str(home / "text.jsonl"), output=tmp_path / "out")


def test_starting_anew_removes_the_state(folders, tmp_path):
    home = folders("llama-gqa")
    options = {"data": str(home / "text.jsonl"), "output": tmp_path / "out", "strategy": "local", "max_steps": 4}
    (tmp_path / "out.recovery").mkdir()
    (tmp_path / "out.recovery" / "job.json").write_text(json.dumps({"strategy": "another"}))
    with pytest.raises(LlmprunerError, match="another recovery job"):
        api.recover(str(home / "pruned"), **options)
    api.recover(str(home / "pruned"), run=RunSettings(restart=True), **options)
    assert (tmp_path / "out" / "config.json").is_file()


def test_hidden_states_beyond_the_limit_are_in_a_file_with_the_same_result(pruned, dense, tmp_path):
    models = []
    for limit in (0, None):
        model = copy.deepcopy(pruned.model)
        job = job_of(replace(pruned, model=model), dense, tmp_path / str(limit), walk=LayerWalk(boundary_memory=limit))
        LocalStrategy().train(job)
        models.append(model.state_dict())
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_the_disk_that_it_takes_is_known_before(folders, tmp_path, monkeypatch):
    home, expected, held, seen = folders("llama-gqa"), [], set(), []
    keep = Boundaries.keep

    def watched(self, tensor):
        held.add(self)
        return keep(self, tensor)

    def on_step(*_):
        seen.append(tree_bytes(tmp_path / "out.recovery") + sum(found.in_file for found in held))

    monkeypatch.setattr("llmpruner.recipes.recovering.check_space", lambda _, size, what: expected.append((size, what)))
    monkeypatch.setattr(Boundaries, "keep", watched)
    monkeypatch.setattr("llmpruner.engine.journal.INTERVAL", 0.0)
    monkeypatch.setattr("llmpruner.engine.journal.SHARE", 1e9)
    recovered(home, tmp_path / "out", streamed=True, on_step=on_step)
    ((size, what),) = expected
    assert what == "the result, finished layers and hidden states"
    assert 0.5 < (max(seen) + tree_bytes(tmp_path / "out")) / size < 1.1


def test_a_disk_that_is_too_small_is_refused_before_anything_is_loaded(folders, tmp_path, monkeypatch):
    home = folders("llama-gqa")
    monkeypatch.setattr("llmpruner.recipes.opening.Opener.weights", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(OutputError, match="of disk for the result, finished layers and hidden states"):
        recovered(home, tmp_path / "out", streamed=True)
    assert list(tmp_path.iterdir()) == []
