"""Walking the decoder layer by layer gives what the model gives, or is refused."""

import contextlib
import copy

import pytest
import torch
from criteria_cases import CASES, boundaries, layers_of, make, opened, tokens
from torch import nn
from transformers import CONFIG_MAPPING

from llmpruner import ModelError, UnsupportedModelError
from llmpruner.calibration.written import self_generated
from llmpruner.discovery.oracle import random_plan
from llmpruner.discovery.tiny import random_instance, small_config
from llmpruner.engine.execution import Execution
from llmpruner.engine.ranks import Ranks
from llmpruner.engine.walk import ForwardWalk, _same, call_layer, replaced_layers
from llmpruner.models.meta import decoder_layers
from llmpruner.models.numbers import computes_bfloat16_fast
from llmpruner.pruning.compensation.base import RepairTask
from llmpruner.pruning.compensation.compensations import Refit

pytestmark = pytest.mark.usefixtures("full_precision")


def joined(states):
    """Of all samples: (…, samples, length, hidden size), as Gemma 3n has several hidden states of a token."""
    return torch.cat(list(states), -3)


def over(loaded, calibration=None):
    return ForwardWalk.over(Execution.of(loaded.network, loaded.graph.layers), calibration or tokens(4, 16))


def walked(loaded, calibration):
    walk, embedded = over(loaded, calibration)
    found = []
    with torch.no_grad():
        for number in range(len(walk.layers)):
            walk.advance(number, embedded)
            found.append(joined(embedded))
    return walk, found


@pytest.mark.parametrize("name", CASES)
def test_the_walk_gives_the_models_own_hidden_states(name):
    loaded = make(name)
    calibration = tokens(4, 16)
    _, found = walked(loaded, calibration)
    for mine, own in zip(found, boundaries(loaded, calibration.input_ids)[1:], strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-4)


SHARING = {"gemma3n_text": {}, "gemma4_text": {"num_kv_shared_layers": 4, "attention_k_eq_v": True}}
"""Types whose later layers use keys and values of earlier ones."""


@pytest.fixture(params=SHARING)
def sharing(request):
    config = small_config(CONFIG_MAPPING[request.param](**SHARING[request.param]))
    assert "reuse" in config.kv_sharing_modes
    return opened(random_instance(config))


def test_every_micro_batch_has_its_own_keys_and_values(sharing, monkeypatch):
    monkeypatch.setattr("llmpruner.engine.walk.TOKENS_AT_ONCE", 32)
    calibration = tokens(5, 16, vocabulary=sharing.config.vocab_size)
    walk, found = walked(sharing, calibration)
    assert len(walk.calls) == 3
    for mine, own in zip(found, boundaries(sharing, calibration.input_ids)[1:], strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-4)


def test_a_process_without_micro_batches_knows_that_layers_pass_on_keys_and_values(sharing):
    """All processes must agree on it: the journal is written by all or none."""
    calibration = tokens(1, 16, vocabulary=sharing.config.vocab_size)
    for rank, micro_batches in ((0, 1), (1, 0)):
        execution = Execution.of(sharing.network, sharing.graph.layers, Ranks(rank, 2))
        walk, _ = ForwardWalk.over(execution, calibration)
        assert len(walk.calls) == micro_batches and walk.form.passes_on
    assert not over(make("llama-gqa"))[0].form.passes_on


def test_the_dense_and_the_pruned_run_have_their_own_keys_and_values(sharing, monkeypatch):
    """The targets of a compensation are the dense model's hidden states, in every layer."""
    monkeypatch.setattr("llmpruner.engine.walk.TOKENS_AT_ONCE", 32)
    calibration = tokens(5, 16, vocabulary=sharing.config.vocab_size)
    expected, seen = boundaries(sharing, calibration.input_ids)[1:], []

    def record(self, number):
        torch.testing.assert_close(joined(self.dense), expected[number], rtol=1e-3, atol=1e-3)
        seen.append(number)

    monkeypatch.setattr("llmpruner.pruning.compensation.repair._DenseRun._record", record)
    groups = [group for group in sharing.graph.of_kinds(["mlp", "query"]) if group.units > group.minimum]
    kept = random_plan(groups, seed=1, uneven=False)
    Refit().repair(RepairTask(sharing.network, sharing.graph, kept, calibration))
    assert len(seen) == len(expected)


def test_micro_batches_make_no_difference(monkeypatch):
    loaded, calibration = make("llama-gqa"), tokens(5, 16)
    _, whole = walked(loaded, calibration)
    monkeypatch.setattr("llmpruner.engine.walk.TOKENS_AT_ONCE", 32)
    walk, parts = walked(loaded, calibration)
    assert list(walk.firsts) == [0, 2, 4]
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    # Arguments besides the hidden states are kept once for each shape.
    assert walk.calls[0] is walk.calls[1] is not walk.calls[2]


def test_arguments_are_shared_only_where_they_are_equal():
    one = [((), {"mask": torch.ones(2, 3), "tables": (torch.zeros(2), torch.ones(2)), "flag": None})]
    assert _same(one, copy.deepcopy(one))
    for key, value in {"mask": torch.zeros(2, 3), "tables": (torch.zeros(2),), "flag": False, "more": 1}.items():
        assert not _same(one, [((), {**one[0][1], key: value})])
    assert not _same([object()], [object()]) and not _same([torch.ones(2)], [torch.ones(2).half()])


def test_fast_products_stay_near(monkeypatch):
    loaded, calibration = make("llama-gqa"), tokens(4, 16)
    _, exact = walked(loaded, calibration)
    monkeypatch.setattr("llmpruner.engine.walk.computes_bfloat16_fast", lambda model: True)
    _, fast = walked(loaded, calibration)
    assert 0 < float((fast[-1] - exact[-1]).norm() / exact[-1].norm()) < 0.05


@pytest.mark.parametrize(
    ("cpu", "pays"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True}, False),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "AMD Ryzen"}, False),
        ({}, False),
    ],
)
def test_bfloat16_is_for_processors_that_are_faster_with_it(cpu, pays, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: cpu, raising=False)
    model = nn.Linear(1, 1)
    assert computes_bfloat16_fast(model) is pays
    assert not computes_bfloat16_fast(model.bfloat16())


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_are_computed_one_by_one_while_walked(implementation):
    loaded = make("mixtral")
    loaded.network.set_experts_implementation(implementation)
    walked(loaded, tokens(4, 16))
    assert loaded.network.config._experts_implementation == implementation


def test_layers_that_keep_count_of_one_another_are_refused():
    loaded = make("llama-gqa")
    calls = []

    def later_is_louder(_, __, out):
        calls.append(1)
        return out * len(calls)

    for layer in layers_of(loaded):
        layer.register_forward_hook(later_is_louder)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM pass other values.*prune.compensate=none"):
        over(loaded)


@pytest.mark.parametrize("model_type", ["hrm_text", "hy_v4", "zaya"])
def test_real_types_whose_layers_pass_more_than_hidden_states_are_refused(model_type):
    """Layers that run again and again, and layers that need what another has computed."""
    model = random_instance(small_config(CONFIG_MAPPING[model_type]()))
    with pytest.raises(UnsupportedModelError, match="cannot be run one by one"):
        ForwardWalk.over(Execution.of(model, decoder_layers(model)), tokens(2, 9))


def test_layers_are_compared_in_the_first_walk_of_a_run(monkeypatch):
    """A streamed model was read twice more for it in every walk."""
    loaded = make("llama-gqa")
    execution = Execution.of(loaded.network, loaded.graph.layers)
    form = ForwardWalk.over(execution, tokens(4, 16))[0].form
    monkeypatch.setattr("llmpruner.engine.walk.call_layer", None)
    assert ForwardWalk.over(execution, tokens(4, 16))[0].form is form


def test_layers_that_return_lists_are_walked():
    model = random_instance(small_config(CONFIG_MAPPING["openai-gpt"]()))
    walk, _ = ForwardWalk.over(Execution.of(model, decoder_layers(model)), tokens(2, 9))
    assert len(walk.calls) == 1


@pytest.mark.parametrize(("changed", "accepted"), [(3, True), (12, False)])
def test_few_tokens_may_differ_as_rounding_routes_them_to_other_experts(monkeypatch, changed, accepted):
    loaded = make("llama-gqa")

    def called(layer, hidden, call):
        output = call_layer(layer, hidden, call)
        output[:, :changed] *= 1.1
        return output

    monkeypatch.setattr("llmpruner.engine.walk.call_layer", called)
    refused = pytest.raises(UnsupportedModelError, match=r"at layer 0, hidden states differ by 0\.1 from")
    with contextlib.nullcontext() if accepted else refused:
        over(loaded)


def test_operators_that_refuse_autocast_run_in_the_models_precision(monkeypatch):
    """As those of DBRX, which add products in bfloat16 to float32."""
    loaded = make("llama-gqa")
    mlp = layers_of(loaded)[1].mlp
    plain = mlp.forward

    def forward(x):
        out = plain(x)
        return torch.zeros_like(x, dtype=torch.float32).index_add_(1, torch.arange(x.shape[1]), out)

    monkeypatch.setattr(mlp, "forward", forward)
    for module in ("engine.walk", "models.numbers"):
        monkeypatch.setattr(f"llmpruner.{module}.computes_bfloat16_fast", lambda model: True)
    walk, _ = walked(loaded, tokens(4, 16))
    assert walk.form.autocast is None
    written = self_generated(loaded.network, None, 2, 8, 0)
    monkeypatch.setattr("llmpruner.models.numbers.computes_bfloat16_fast", lambda model: False)
    assert torch.equal(written, self_generated(loaded.network, None, 2, 8, 0))


def test_damaged_weights_are_not_taken_for_an_odd_model():
    loaded = make("llama-gqa")
    with torch.no_grad():
        layers_of(loaded)[1].mlp.down_proj.weight[3, 5] = float("nan")
    with pytest.raises(ModelError, match="the weights are damaged") as error:
        over(loaded)
    assert not isinstance(error.value, UnsupportedModelError)


def test_a_forward_that_another_library_put_on_a_layer_is_put_back():
    layers = nn.ModuleList([nn.Identity(), nn.Identity()])
    own = layers[0].forward = lambda x: x + 1
    with replaced_layers(layers, lambda number, x: x * number):
        assert layers[1](torch.tensor(5)) == 5
        assert layers[0](torch.tensor(5)) == 0
    assert layers[0].forward is own
    assert "forward" not in vars(layers[1])
