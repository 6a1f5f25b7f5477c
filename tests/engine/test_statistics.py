"""Statistics of the inputs of weights and of the residual stream equal those of plain forward hooks."""

from math import pi

import pytest
import torch
from criteria_cases import boundaries, experts_of, layers_of, make, observed, tokens
from transformers import CONFIG_MAPPING

from llmpruner import ModelError, Signal
from llmpruner.discovery.tiny import random_instance
from llmpruner.discovery.verify import representative
from llmpruner.engine.execution import Execution
from llmpruner.engine.statistics import add_gram, both_triangles, forward_statistics, stream_statistics
from llmpruner.engine.walk import ForwardWalk
from llmpruner.models.family import AutoFamily

pytestmark = pytest.mark.usefixtures("full_precision")

CALIBRATION = tokens(6, 16)


def statistics(loaded, wanted, *, gram=True):
    needs = {Signal.GRAM if gram else Signal.INPUT_STATS}
    stream = forward_statistics(Execution.of(loaded.model, loaded.graph.layers), wanted, CALIBRATION, needs, None)
    found = list(stream)
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
    for parameter, stats in found.items():
        x, _ = observed(loaded.model, parameter.removesuffix(".weight"), CALIBRATION.input_ids)
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
        weight = loaded.model.get_parameter(parameter)
        assert (stats.second_moment * weight).shape == weight.shape


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_experts_are_averaged_over_all_tokens(name):
    """A token routed elsewhere counts as zero: its part of the output is zero."""
    loaded = make(name)
    path, experts = experts_of(loaded.model, 1)
    stats = statistics(loaded, [f"{path}.down_proj"])[f"{path}.down_proj"]
    seen = []
    handle = experts.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    with torch.no_grad():
        loaded.model.set_experts_implementation("eager")
        loaded.model(input_ids=CALIBRATION.input_ids, use_cache=False)
    handle.remove()
    count, width = 4, stats.second_moment.shape[stats.axis]
    assert stats.gram.shape == (count, width, width)
    torch.testing.assert_close(
        stats.gram.diagonal(dim1=-2, dim2=-1), stats.second_moment.flatten(1), rtol=1e-4, atol=1e-6
    )
    (args, _), total = seen[0], CALIBRATION.input_ids.numel()
    if name == "mixtral":
        hidden, chosen = args[0], args[1]
        for expert in range(count):
            rows = hidden[(chosen == expert).any(1)]
            gate, up = (rows @ experts.gate_up_proj[expert].T).chunk(2, -1)
            x = (torch.nn.functional.silu(gate) * up).double()
            torch.testing.assert_close(stats.gram[expert].double(), x.T @ x / total, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("width", [0, 1, 3, 4, 5, 17])
def test_half_of_the_products_give_the_whole_gram_matrix(width):
    x, lower = torch.randn(40, width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for part in x.split([1, 39, 0]):
        add_gram(lower, part)
    torch.testing.assert_close(both_triangles(lower), x.T @ x)


def test_inputs_that_are_not_finite_numbers_are_an_error():
    """Layers are checked on the first sample alone, and others may overflow in float16."""
    loaded = make("llama-gqa")
    down = layers_of(loaded)[1].mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: (args[0] / 0,) if len(args[0]) > 1 else None)
    with pytest.raises(ModelError, match=r"inputs of '.*down_proj.weight' are not finite numbers: .* in float32"):
        statistics(loaded, ["model.layers.1.mlp.down_proj.weight"])


def test_gram_matrices_are_made_only_when_asked_for():
    loaded = make("llama-gqa")
    name = "model.layers.1.mlp.down_proj.weight"
    assert statistics(loaded, [name], gram=False)[name].gram is None


@pytest.mark.parametrize("at_once", [32, 4096])
def test_the_stream_is_compared_over_blocks_of_layers(at_once, monkeypatch):
    monkeypatch.setattr("llmpruner.engine.walk.TOKENS_AT_ONCE", at_once)
    loaded = make("llama-gqa")
    states = [state.double() for state in boundaries(loaded, CALIBRATION.input_ids)]
    for length in (1, 2, 3):
        found = stream_statistics(Execution.of(loaded.model, loaded.graph.layers), CALIBRATION, length)
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
