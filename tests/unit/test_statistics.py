"""What a layer is multiplied with, and how it turns the stream: equal to plain forward hooks."""

from __future__ import annotations

from math import pi

import pytest
import torch
from criteria_cases import layers_of, make, tokens

from llmpruner.engine.inputs import input_statistics, stream_statistics
from llmpruner.progress import Progress

CALIBRATION = tokens(6, 16)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr("llmpruner.engine.walk.computes_bfloat16_fast", lambda model: False)


def statistics(loaded, wanted, *, gram=True):
    found = {}
    for layer in input_statistics(loaded.model, loaded.graph.layers, wanted, CALIBRATION, Progress(), gram=gram):
        assert not found.keys() & layer.keys()
        found.update(layer)
    return found


def inputs_of(loaded, names):
    rows = {name: [] for name in names}
    handles = [
        loaded.model.get_submodule(name.removesuffix(".weight")).register_forward_hook(
            lambda _, args, __, name=name: rows[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        loaded.model(input_ids=CALIBRATION.input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found).double() for name, found in rows.items()}


@pytest.mark.parametrize(
    ("name", "axis", "modules"),
    [
        ("llama-gqa", 1, ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj")),
        ("gpt2", 0, ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj")),
    ],
)
@pytest.mark.parametrize("at_once", [32, 4096])
def test_they_equal_forward_hooks(name, axis, modules, at_once, monkeypatch):
    monkeypatch.setattr("llmpruner.engine.walk._TOKENS_AT_ONCE", at_once)
    loaded = make(name)
    wanted = [module.format(n) + ".weight" for module in modules for n in (0, 2)]
    found = statistics(loaded, wanted)
    assert sorted(found) == sorted(wanted)
    for parameter, x in inputs_of(loaded, wanted).items():
        stats, shape = found[parameter], [1, 1]
        shape[axis] = x.shape[1]
        assert stats.axis == axis
        for actual, expected in (
            (stats.mean, x.mean(0).view(shape)),
            (stats.power, x.square().mean(0).view(shape)),
            (stats.variance, x.var(0, correction=0).view(shape)),
            (stats.gram, x.T @ x / len(x)),
        ):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
        assert (stats.power * loaded.model.get_parameter(parameter)).shape == loaded.model.get_parameter(
            parameter
        ).shape


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_experts_are_averaged_over_all_tokens(name):
    """A token that goes elsewhere is a zero: what an expert adds to the output is what counts."""
    loaded = make(name)
    experts = next(m for n, m in layers_of(loaded)[1].named_modules() if n.endswith("experts"))
    parameter = next(n for n, p in loaded.model.named_parameters() if p is experts.down_proj)
    stats = statistics(loaded, [parameter])[parameter]
    seen = []
    handle = experts.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    with torch.no_grad():
        loaded.model.set_experts_implementation("eager")
        loaded.model(input_ids=CALIBRATION.input_ids, use_cache=False)
    handle.remove()
    count, width = 4, stats.power.shape[stats.axis]
    assert stats.gram.shape == (count, width, width)
    torch.testing.assert_close(stats.gram.diagonal(dim1=-2, dim2=-1), stats.power.flatten(1), rtol=1e-4, atol=1e-6)
    (args, _), total = seen[0], CALIBRATION.input_ids.numel()
    if name == "mixtral":
        hidden, chosen = args[0], args[1]
        for expert in range(count):
            rows = hidden[(chosen == expert).any(1)]
            gate, up = (rows @ experts.gate_up_proj[expert].T).chunk(2, -1)
            x = (torch.nn.functional.silu(gate) * up).double()
            torch.testing.assert_close(stats.gram[expert].double(), x.T @ x / total, rtol=1e-3, atol=1e-5)


def test_gram_matrices_are_made_only_when_asked_for():
    loaded = make("llama-gqa")
    name = "model.layers.1.mlp.down_proj.weight"
    assert statistics(loaded, [name], gram=False)[name].gram is None


def test_layers_behind_the_last_wanted_are_not_run():
    loaded = make("llama-gqa")
    stream = input_statistics(
        loaded.model, loaded.graph.layers, ["model.layers.0.mlp.down_proj.weight"], CALIBRATION, Progress(), gram=False
    )
    next(stream)
    layers_of(loaded)[1].forward = None
    assert list(stream) == []


def test_the_turn_of_the_stream():
    loaded = make("llama-gqa")
    states = []
    for layer in layers_of(loaded):
        layer.register_forward_hook(lambda _, args, out: states.append((args[0], out)))
    found = stream_statistics(loaded.model, loaded.graph.layers, CALIBRATION, Progress())
    states.clear()
    with torch.no_grad():
        loaded.model(input_ids=CALIBRATION.input_ids, use_cache=False)
    for stats, (before, after) in zip(found, states, strict=True):
        cosine = torch.cosine_similarity(before.double(), after.double(), dim=-1)
        assert stats.cosine == pytest.approx(float(cosine.mean()), abs=1e-5)
        assert stats.angle == pytest.approx(float(cosine.arccos().mean()) / pi, abs=1e-4)
