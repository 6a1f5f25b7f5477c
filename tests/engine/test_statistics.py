"""Statistics and gradients of the layer-by-layer walk equal those of plain forward hooks and of autograd over the whole
model."""

import weakref
from math import pi

import pytest
import torch
from criteria_cases import boundaries, called, experts_of, layers_of, make, observed, tokens
from transformers import CONFIG_MAPPING

from llmpruner import ModelError, Signal
from llmpruner.calibration.written import self_generated
from llmpruner.discovery.tiny import random_instance, small_config
from llmpruner.discovery.verify import representative
from llmpruner.engine.execution import Execution
from llmpruner.engine.signals import kinds_read
from llmpruner.engine.statistics import SignalWalk, stream_statistics
from llmpruner.engine.walk import CalibrationSet, ForwardWalk
from llmpruner.models.family import AutoFamily
from llmpruner.models.meta import graph_of

pytestmark = pytest.mark.usefixtures("full_precision")

CALIBRATION = tokens(6, 16)


def statistics(loaded, wanted, *, gram=True):
    needs = {Signal.GRAM if gram else Signal.INPUT_STATS}
    execution = Execution.of(loaded.network, loaded.graph.layers)
    found = list(SignalWalk(execution, kinds_read(loaded.graph), wanted, needs, CALIBRATION, 0, None).forward())
    assert len(dict(found)) == len(found)
    return {name: inputs for name, (inputs, _) in found}


@pytest.mark.parametrize(
    ("name", "axis", "modules"),
    [
        ("llama-gqa", 1, ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj")),
        ("gpt2", 0, ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj")),
    ],
)
@pytest.mark.parametrize("at_once", [32, 4096])
def test_they_equal_forward_hooks(name, axis, modules, at_once, monkeypatch):
    monkeypatch.setattr("llmpruner.engine.walk.TOKENS_AT_ONCE", at_once)
    loaded = make(name)
    wanted = [module.format(n) + ".weight" for module in modules for n in (0, 2)]
    found = statistics(loaded, wanted)
    assert sorted(found) == sorted(wanted)
    assert all(stats.gram is None for stats in statistics(loaded, wanted, gram=False).values()), "only when asked for"
    for parameter, stats in found.items():
        x, _ = observed(loaded.network, parameter.removesuffix(".weight"), CALIBRATION.input_ids)
        shape = [1, 1]
        shape[axis] = x.shape[1]
        assert stats.axis == axis
        for actual, expected in (
            (stats.mean, x.mean(0).view(shape)),
            (stats.second_moment, x.square().mean(0).view(shape)),
            (stats.variance, x.var(0, correction=0).view(shape)),
            (stats.gram, x.T @ x / len(x)),
        ):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
        weight = loaded.network.get_parameter(parameter)
        assert (stats.second_moment * weight).shape == weight.shape


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_experts_are_averaged_over_all_tokens(name):
    """A token routed elsewhere counts as zero: its part of the output is zero."""
    loaded = make(name)
    path, experts = experts_of(loaded.network, 1)
    stats = statistics(loaded, [f"{path}.down_proj"])[f"{path}.down_proj"]
    loaded.network.set_experts_implementation("eager")
    args, _ = called(loaded.network, path, CALIBRATION.input_ids)
    count, width = 4, stats.second_moment.shape[stats.axis]
    assert stats.gram.shape == (count, width, width)
    torch.testing.assert_close(
        stats.gram.diagonal(dim1=-2, dim2=-1), stats.second_moment.flatten(1), rtol=1e-4, atol=1e-6
    )
    total = CALIBRATION.input_ids.numel()
    if name == "mixtral":
        hidden, chosen = args[0], args[1]
        for expert in range(count):
            rows = hidden[(chosen == expert).any(1)]
            gate, up = (rows @ experts.gate_up_proj[expert].T).chunk(2, -1)
            x = (torch.nn.functional.silu(gate) * up).double()
            torch.testing.assert_close(stats.gram[expert].double(), x.T @ x / total, rtol=1e-3, atol=1e-5)


def test_inputs_that_are_not_finite_numbers_are_an_error():
    """Layers are checked on the first sample alone, and others may overflow in float16."""
    loaded = make("llama-gqa")
    down = layers_of(loaded)[1].mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: (args[0] / 0,) if len(args[0]) > 1 else None)
    with pytest.raises(ModelError, match=r"inputs of '.*down_proj.weight' are not finite numbers: .* in float32"):
        statistics(loaded, ["model.layers.1.mlp.down_proj.weight"])


@pytest.mark.parametrize("at_once", [32, 4096])
def test_the_stream_is_compared_over_blocks_of_layers(at_once, monkeypatch):
    monkeypatch.setattr("llmpruner.engine.walk.TOKENS_AT_ONCE", at_once)
    loaded = make("llama-gqa")
    states = [state.double() for state in boundaries(loaded, CALIBRATION.input_ids)]
    for length in (1, 2, 3):
        found = stream_statistics(Execution.of(loaded.network, loaded.graph.layers), CALIBRATION, length)
        assert found.length == length and found.cosine.shape == found.angle.shape == (3,)
        assert found.cosine.isnan().tolist() == found.angle.isnan().tolist() == [n + length > 3 for n in range(3)]
        for start in range(4 - length):
            cosine = torch.cosine_similarity(states[start], states[start + length], dim=-1)
            assert float(found.cosine[start]) == pytest.approx(float(cosine.mean()), abs=1e-5)
            assert float(found.angle[start]) == pytest.approx(float(cosine.arccos().mean()) / pi, abs=1e-4)


def test_prompts_that_a_model_puts_before_the_text_are_no_tokens_of_it():
    """CPM-Ant has hidden states of its own before those of a text."""
    model = random_instance(representative(CONFIG_MAPPING["cpmant"](), AutoFamily())[0]).eval()
    own = model.config.prompt_length
    execution = Execution.of(model, "cpmant.encoder.layers")
    _, (states,) = ForwardWalk.over(execution, CALIBRATION)
    assert own > 0 and states.shape[1] == own + 16
    found = stream_statistics(execution, CALIBRATION)
    after = []
    model.cpmant.encoder.layers[0].register_forward_hook(lambda _, __, out: after.append(out[0]))
    with torch.no_grad():
        model(CALIBRATION.input_ids, use_cache=False)
    of_text = torch.cosine_similarity(states[:, own:], after[0][:, own:], dim=-1)
    assert float(found.cosine[0]) == pytest.approx(float(of_text.double().mean()), abs=1e-5)


def calibrate(loaded, samples=5):
    return CalibrationSet(self_generated(loaded.network, None, samples, 17, 0), "self")


def stored(graph):
    return [name for name in graph.shapes if name not in graph.ties]


def walk(model, graph, calibration, names=None):
    needs = {Signal.WEIGHT, Signal.GRAD, Signal.GRAD_SQ}
    execution = Execution.of(model, graph.layers)
    return SignalWalk(execution, kinds_read(graph), names or stored(graph), needs, calibration, 0, None)


def test_gradients_equal_plain_autograd(loaded):
    assert_autograd(loaded.network, loaded.graph, calibrate(loaded))


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("gemma3n_text", {}), ("gemma4_text", {"num_kv_shared_layers": 4, "attention_k_eq_v": True})],
)
def test_gradients_of_keys_and_values_that_later_layers_use_are_sums(model_type, sizes):
    """These types also compute an input of each layer from embeddings of its own."""
    config = small_config(CONFIG_MAPPING[model_type](**sizes))
    assert "reuse" in config.kv_sharing_modes and config.hidden_size_per_layer_input
    ids = torch.randint(3, config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(0))
    model = random_instance(config)
    assert_autograd(model, graph_of(model, ()), CalibrationSet(ids, "random"))


def assert_autograd(model, graph, calibration):
    """In float64: sums of float32 products round otherwise with another number of threads."""
    model, ids = model.double(), calibration.input_ids
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.float() for name, p in model.named_parameters()}
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in ids:
        model.zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        for name, parameter in model.named_parameters():
            squares[name] += parameter.grad.square() / len(ids)
    model.zero_grad()

    seen = set()
    for name, signals in walk(model, graph, calibration):
        torch.testing.assert_close(
            signals.grad, expected[name], rtol=2e-4, atol=1e-6 * float(expected[name].abs().max())
        )
        torch.testing.assert_close(
            signals.grad_sq, squares[name].float(), rtol=2e-4, atol=1e-6 * float(squares[name].max())
        )
        seen.add(name)
    assert seen == set(stored(graph))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_gradients_of_one_layer_exist_at_a_time(gqa):
    alive = []
    for name, signals in walk(gqa.network, gqa.graph, calibrate(gqa)):
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        alive.append((layer, weakref.ref(signals.grad)))
        layers = {number for number, reference in alive if reference() is not None}
        assert layers == {layer}


def test_protected_layers_are_not_walked(gqa):
    wanted = [n for n in stored(gqa.graph) if n.startswith("model.layers.2.mlp.")]
    differentiated = []
    for layer in gqa.network.model.layers:
        layer.register_forward_hook(lambda _, args, __: differentiated.append(args[0].requires_grad))
    found = [name for name, _ in walk(gqa.network, gqa.graph, calibrate(gqa, 1), wanted)]
    assert sorted(found) == sorted(wanted)
    assert sum(differentiated) == 2, "layers 3 and 2 are walked back, 1 and 0 are not"


def test_damaged_weights_are_named(gqa):
    calibration = calibrate(gqa)
    with torch.no_grad():
        gqa.network.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="are not finite numbers"):
        list(walk(gqa.network, gqa.graph, calibration))
