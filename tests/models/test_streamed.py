"""Weights that are read layer by layer give the same plan and the same weights, bit for bit, as a model in memory."""

import json
from functools import cache

import pytest
import torch
from criteria_cases import make
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from llmpruner import Signal, api
from llmpruner.discovery.tiny import random_instance, small_config
from llmpruner.engine.execution import Execution
from llmpruner.engine.signals import kinds_read
from llmpruner.engine.statistics import SignalWalk
from llmpruner.engine.walk import CalibrationSet, ForwardWalk
from llmpruner.errors import ModelError, SettingsError
from llmpruner.models.meta import graph_of
from llmpruner.models.opening import CheckpointWeights, load_pruned
from llmpruner.models.weights import Weights
from llmpruner.settings import RunSettings

pytestmark = pytest.mark.usefixtures("full_precision")

UNITS = {"kinds": "mlp,attention", "calibration": "self"}
ALL_LAYERS = {"layers": "all", "calibration": "self"}
METHODS = {
    "best": {"method": "best", "samples": 6, "length": 16, **UNITS},
    "taylor": {"method": "llm-pruner", "samples": 4, "length": 12, **UNITS},
    "squares": {"importance": "taylor", "settings": {"taylor": {"variant": "mix"}}, "samples": 3, "length": 8, **UNITS},
    "obs": {"importance": "obs", "samples": 4, "length": 16, "compensate": "refit", "calibration": "self"},
    "hidden": {"importance": "l1", "kinds": "hidden", "ratio": 0.1},
    "layer": {"importance": "angular", "kinds": "layer", "ratio": 0.4, **ALL_LAYERS},
    "query": {"importance": "energy", "kinds": "query", "ratio": 0.1, **ALL_LAYERS},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A folder with the model of one of the `CASES`."""

    @cache
    def folder(name):
        make(name).network.save_pretrained(path := tmp_path_factory.mktemp(name) / "dense")
        return path

    return folder


def prune(model, output, *, streamed, max_memory=None, **settings):
    run = RunSettings(max_memory=max_memory)
    with pytest.MonkeyPatch.context() as patch:
        # Otherwise the size of the free memory decides.
        patch.setattr("llmpruner.pruning.forecast.free_memory", lambda _: 0 if streamed else 1 << 50)
        return api.prune(str(model), output=output, run=run, **{"ratio": 0.2, **settings})


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(one, other):
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    records = [json.loads((folder / "llmpruner.json").read_text()) for folder in (one, other)]
    assert records[0]["plans"] == records[1]["plans"]


PAIRS = [
    *((name, "best") for name in ("gpt2", "gpt_oss", "llama4", "mixtral")),
    *(("llama-gqa", method) for method in METHODS),
    ("mixtral", "squares"),
]
"""Layouts: separate and fused projections, tied heads, experts one by one in the files, stacked, and with biases."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_the_result_is_that_of_a_model_in_memory(name, method, dense, tmp_path):
    resident = prune(dense(name), tmp_path / "resident", streamed=False, **METHODS[method])
    streamed = prune(dense(name), tmp_path / "streamed", streamed=True, **METHODS[method])
    assert resident.streamed is None and streamed.streamed is not None
    assert_same(tmp_path / "resident", tmp_path / "streamed")
    loaded = load_pruned(tmp_path / "streamed")
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        expected = load_pruned(tmp_path / "resident")(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected)
        # The result that is returned is read from its files, after the folder of the run is gone.
        torch.testing.assert_close(streamed.network(ids).logits, expected)
    assert not (tmp_path / "streamed.pruning").exists()


def test_gradients_flow_to_keys_that_later_layers_use(tmp_path):
    """And to embeddings of which an input of each layer is computed."""
    random_instance(small_config(CONFIG_MAPPING["gemma3n_text"]())).save_pretrained(tmp_path)
    model = load_pruned(tmp_path)
    graph = graph_of(model, ())
    opened = CheckpointWeights(tmp_path, torch.float32, graph.layers, torch.device("cpu"))
    text = CalibrationSet(torch.arange(3, 19).view(2, 8), "numbers")
    names, found = graph.shapes.keys() - graph.ties, []
    for weights in (Weights(model, graph.layers), opened):
        signals = SignalWalk(Execution(weights), kinds_read(graph), names, {Signal.WEIGHT, Signal.GRAD}, text, 0, None)
        found.append({name: torch.stack([own.weight, own.grad]) for name, own in signals})
    resident, streamed = found
    assert resident.keys() == streamed.keys() == names
    assert [name for name in names if not torch.equal(resident[name], streamed[name])] == []


def test_one_layer_at_a_time_has_values(dense, tmp_path, monkeypatch):
    held = set()
    run = ForwardWalk.run

    def watched(walk, number, *arguments, **options):
        names = [name for name, parameter in walk.execution.model.named_parameters() if not parameter.is_meta]
        held.add(len({walk.execution.weights.number(name) for name in names}))
        return run(walk, number, *arguments, **options)

    monkeypatch.setattr(ForwardWalk, "run", watched)
    prune(dense("llama-gqa"), tmp_path / "out", streamed=True, **METHODS["best"])
    assert held == {1}


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"steps": 2, "importance": "l2"}, "--steps cuts copies"),
        ({"budget": "kv-cache", "kinds": "attention"}, "measures the model"),
    ],
)
def test_what_needs_the_whole_model_is_refused_beforehand(settings, why, dense, tmp_path):
    with pytest.raises(SettingsError, match=f"--max-memory 0.0 MiB: .* needs at least .*{why}"):
        api.prune(
            str(dense("llama-gqa")), output=tmp_path / "out", run=RunSettings(max_memory=1000),
            **{"ratio": 0.2, **settings},
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_plan_of_a_measured_budget_is_replayed_in_memory(dense, tmp_path):
    made = api.plan(str(dense("llama-gqa")), ratio=0.3, budget="kv-cache", kinds="attention", importance="l2")
    pruned = prune(dense("llama-gqa"), tmp_path / "out", streamed=True, ratio=None, plan=made)
    assert pruned.streamed is None and pruned.outcome.budget.removed == pytest.approx(1 / 3)


@pytest.mark.parametrize("options", [METHODS["best"], {"importance": "l2", "steps": 2}], ids=["fits", "copies"])
def test_a_streamed_model_that_must_be_in_memory_is_refused(options, dense, tmp_path):
    """A fit ended in a traceback, after the scores."""
    streamed = prune(dense("llama-gqa"), tmp_path / "once", streamed=True, importance="l2")
    with pytest.raises(ModelError, match="dense' is read layer by layer; pass its folder"):
        api.prune(streamed, ratio=0.2, output=tmp_path / "twice", **options)
    with pytest.raises(ModelError, match="dense' is read layer by layer; pass its folder"):
        api.bench(streamed, batch=1, prompt=4, new=1, rounds=1)
    assert api.prune(streamed, ratio=0.2, output=tmp_path / "twice", importance="l2").plans[1:]


WEIGHTS = {"ratio": None, "importance": "l1", "compensate": "none"}
CUTS = {
    "heads": {**WEIGHTS, "unit_ratio": 0.25, "kinds": "attention", "shape": "free", "layers": "all"},
    "layer": {**WEIGHTS, "unit_ratio": 0.5, "kinds": "layer", "layers": "0,1"},
}


@pytest.fixture(scope="module", params=CUTS)
def once(request, tmp_path_factory):
    """A pruned model, whose modules keep counts."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = CONFIG_MAPPING["gpt2"](vocab_size=96, n_embd=32, n_layer=4, n_head=8, n_positions=64)
    random_instance(config).save_pretrained(folder / "dense")
    prune(folder / "dense", folder / "once", streamed=False, **CUTS[request.param])
    return folder / "once"


@pytest.mark.parametrize("second", CUTS)
def test_a_pruned_model_is_pruned_again(once, second, tmp_path):
    """Counts follow from those after the first cut."""
    prune(once, tmp_path / "twice", streamed=False, **CUTS[second])
    assert {check.state for check in api.verify_checkpoint(tmp_path / "twice").checks} == {"passed"}


def test_a_layer_is_removed_where_the_others_state_sizes_of_their_own(dense, tmp_path):
    """The configuration states what each layer kept, and the model is built with all layers before they are removed."""
    first = {**WEIGHTS, "ratio": 0.2, "kinds": "mlp,attention", "shape": "free", "layers": "all"}
    prune(dense("llama-gqa"), tmp_path / "once", streamed=False, **first)
    pruned = prune(tmp_path / "once", tmp_path / "twice", streamed=False, **CUTS["layer"])
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(load_pruned(tmp_path / "twice")(ids).logits, pruned.network(ids).logits)
    assert {check.state for check in api.verify_checkpoint(tmp_path / "twice").checks} == {"passed"}


def test_a_pruned_model_whose_code_initializes_by_its_own_sizes(tmp_path):
    """transformers initializes what is not in memory too, and Mamba's code takes sizes of the dense model for it."""
    random_instance(small_config(CONFIG_MAPPING["mamba"]())).save_pretrained(tmp_path / "dense")
    settings = {**WEIGHTS, "unit_ratio": 0.2, "kinds": "mlp"}
    prune(tmp_path / "dense", tmp_path / "once", streamed=True, **settings)
    states = {check.name: check.state for check in api.verify_checkpoint(tmp_path / "once").checks}
    assert set(states.values()) == {"passed"}, states


def test_buffers_are_on_the_device_of_the_computation(tmp_path):
    """Biases of a router, which are added on the device as they are. The meta device stands for a GPU."""
    random_instance(small_config(CONFIG_MAPPING["deepseek_v3"]())).save_pretrained(tmp_path)
    opened = CheckpointWeights(tmp_path, torch.float32, "model.layers", torch.device("meta"))
    buffers = dict(opened.model.named_buffers())
    assert any("e_score_correction_bias" in name for name in buffers)
    assert {buffer.device.type for buffer in buffers.values()} == {"meta"}


def test_tied_parameters_that_are_stored_twice(tmp_path):
    model = make("gpt2").network
    model.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened = CheckpointWeights(tmp_path, torch.float32, "transformer.h", torch.device("cpu")).model
    assert opened.lm_head.weight is opened.transformer.wte.weight


def test_other_formats_are_to_be_converted_once(tmp_path):
    model = make("llama-gqa").network
    model.save_pretrained(tmp_path / "dense")
    torch.save(load_file(tmp_path / "dense/model.safetensors"), tmp_path / "dense/pytorch_model.bin")
    (tmp_path / "dense/model.safetensors").unlink()
    with pytest.raises(SettingsError, match=r"convert it once by llmpruner export .* --to stock"):
        prune(tmp_path / "dense", tmp_path / "out", streamed=False, importance="l1", max_memory=1000)
