"""Statistics that a criterion makes of products: which products with a weight are seen and told apart by axis and slot,
what the criterion is shown, and how its sums are added up."""

import gc
import weakref

import pytest
import torch
from criteria_cases import experts_of, layers_of, make, tokens
from torch import nn
from torch.nn import functional
from transformers import CONFIG_MAPPING

from llmpruner import ImportanceCriterion, Role, Signal, UnsupportedModelError
from llmpruner.discovery.tiny import random_instance, small_config
from llmpruner.engine.execution import Execution
from llmpruner.engine.products import WatchProducts
from llmpruner.engine.signals import kinds_read
from llmpruner.engine.statistics import SignalWalk
from llmpruner.models.meta import graph_of
from llmpruner.pruning.criteria.estimate import estimate

CALIBRATION = tokens(6, 16)
UP, DOWN = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "down"))


@pytest.fixture(autouse=True)
def small_micro_batches(monkeypatch, full_precision):
    monkeypatch.setattr("llmpruner.engine.walk.TOKENS_AT_ONCE", 4 * 16)
    monkeypatch.setattr("llmpruner.engine.gradients.TOKENS_WITH_GRADIENTS", 4 * 16)
    monkeypatch.setattr("llmpruner.models.generation.LOGIT_ELEMENTS", 4 * 5 * 96)


def shown(model, names, calibration=CALIBRATION):
    """Every product with ``names`` in a forward walk."""
    found, graph = [], graph_of(model, ())
    execution = Execution.of(model, graph.layers)
    reads, needs = kinds_read(graph), {Signal.PRODUCT}
    list(SignalWalk(execution, reads, names, needs, calibration, 0, lambda p: found.append(p) or {}))
    return found


def signals_of(loaded, names, measure, *needs):
    execution = Execution.of(loaded.network, loaded.graph.layers)
    return dict(SignalWalk(execution, kinds_read(loaded.graph), names, set(needs), CALIBRATION, 0, measure))


MIXTURES = [
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "granitemoe", "phimoe", "glm4_moe",
    "ernie4_5_moe", "minimax", "minimax_m2",
]  # fmt: skip


@pytest.mark.parametrize("model_type", MIXTURES)
def test_gates_times_outputs_of_experts_add_up_to_what_the_experts_return(model_type):
    """So rows, router weights and biases belong together."""
    model = random_instance(small_config(CONFIG_MAPPING[model_type]()))
    path, experts = experts_of(model)
    calibration = tokens(3, 9, vocabulary=int(model.get_input_embeddings().weight.shape[0]))
    returned = []
    handle = experts.register_forward_hook(lambda _, __, out: returned.append(out.flatten(0, -2)))
    found = shown(model, [f"{path}.down_proj"], calibration)
    handle.remove()
    total = sum((product.gates[:, None] * product.outputs).sum(0) for product in found)
    expected = returned[-1].sum(0)
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_rows_of_one_matrix_have_a_gate_of_one():
    loaded = make("llama-gqa")
    found = shown(loaded.network, [DOWN])
    assert [len(product.inputs) for product in found] == [4 * 16, 2 * 16]
    for product in found:
        assert product.expert is None and product.num_samples == 6
        assert torch.equal(product.gates, torch.ones(len(product.inputs)))
        torch.testing.assert_close(product.outputs, product.inputs @ product.weight.T)


def test_a_transposed_weight_is_shown_as_out_by_in_and_with_its_bias():
    loaded = make("gpt2")
    path = "transformer.h.1.mlp.c_proj"
    bias = loaded.network.get_submodule(path).bias
    (product, *_) = shown(loaded.network, [f"{path}.weight"])
    assert product.weight.shape == (48, 56)
    torch.testing.assert_close(product.outputs, product.inputs @ product.weight.T + bias)


@pytest.mark.parametrize("name", ["llama4", "mixtral"])
def test_router_weights_that_cannot_be_determined_are_an_error_of_their_own(name, monkeypatch):
    """Llama 4 multiplies them with the inputs, and calls its experts with nothing else. Experts of Mixtral are made to
    take their rows in another order than that in which they are called with them."""
    loaded = make(name)
    path, experts = experts_of(loaded.network, 1)
    if name == "mixtral":
        kind, own = type(experts), type(experts).forward
        monkeypatch.setattr(kind, "forward", lambda self, x, chosen, gates: own(self, x.flip(0), chosen, gates))
    (product, *_) = shown(loaded.network, [f"{path}.down_proj"])
    with pytest.raises(UnsupportedModelError, match="the router weight of each token of an expert is not known"):
        _ = product.gates


def squares(product):
    return {"square": product.inputs.square().sum(0), "rows": product.inputs.new_full((), len(product.inputs))}


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "mixtral", "gpt_oss"])
def test_sums_are_added_up_over_micro_batches_and_kept_apart_by_expert(name):
    loaded = make(name)
    group = next(g for g in loaded.graph.of_kinds(["mlp"]) if g.layer == 1)
    reader = next(group.spans_with(Role.CONSUMES)).parameter
    needs = Signal.INPUT_STATS, Signal.PRODUCT
    signals = signals_of(loaded, [reader, "model.norm.weight" if name != "gpt2" else "transformer.ln_f.weight"],
                         squares, *needs)  # fmt: skip
    found = signals[reader]
    sums, total = found.products.sums, CALIBRATION.input_ids.numel()
    assert found.products.axis == found.inputs.axis and sums["square"].dtype == torch.float64
    width = found.inputs.second_moment.shape[found.inputs.axis]
    expected = found.inputs.second_moment.double() * total
    torch.testing.assert_close(sums["square"].flatten(), expected.flatten(), rtol=1e-5, atol=1e-8)
    if found.weight.dim() == 2:
        assert sums["square"].shape == (width,) and int(sums["rows"]) == total
    else:
        assert sums["square"].shape == (4, width)
        assert int(sums["rows"].sum()) == 2 * total, "every token goes to two experts"
    (other,) = (s for n, s in signals.items() if n != reader)
    assert other.products is None and other.inputs is None


def test_gradients_at_a_product_make_the_gradient_of_its_weight():
    """Summed over rows, ∂L/∂W = Gᵀ X; the loss of each sample counts by its share."""
    loaded = make("mixtral")
    group = next(g for g in loaded.graph.of_kinds(["mlp"]) if g.layer == 1)
    names = sorted({span.parameter for span in group.spans})
    signals = signals_of(
        loaded, names, lambda p: {"outer": p.output_grads.T @ p.inputs / p.num_samples},
        Signal.GRAD, Signal.PRODUCT_GRAD,
    )  # fmt: skip
    for name in names:
        found = signals[name]
        assert found.products.axis == 2
        torch.testing.assert_close(
            found.products.sums["outer"].float(), found.grad, rtol=1e-3, atol=1e-5 * float(found.grad.abs().max())
        )


def test_sums_of_the_forward_pass_are_there_with_gradients_too():
    loaded = make("llama-gqa")
    alone = signals_of(loaded, [DOWN], squares, Signal.PRODUCT)[DOWN].products
    found = signals_of(loaded, [DOWN], squares, Signal.PRODUCT, Signal.GRAD)[DOWN]
    assert found.grad is not None and torch.equal(found.products.sums["square"], alone.sums["square"])


def test_gradients_of_inputs_go_through_this_product_alone():
    loaded = make("llama-gqa")

    def measure(product):
        return {"own": product.input_grads.sum(0), "by hand": (product.output_grads @ product.weight).sum(0)}

    sums = signals_of(loaded, [UP], measure, Signal.PRODUCT_GRAD)[UP].products.sums
    assert bool(sums["own"].any())
    assert torch.equal(sums["own"], sums["by hand"])


@pytest.mark.parametrize("need", [Signal.PRODUCT, Signal.PRODUCT_GRAD])
def test_no_activation_outlives_its_micro_batch(need):
    loaded = make("llama-gqa")
    alive = []

    def measure(product):
        gc.collect()
        batch = len(product.inputs)
        assert {number for number, reference in alive if reference() is not None} <= {batch}
        alive.append((batch, weakref.ref(product.outputs)))
        return {}

    names = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    signals_of(loaded, names, measure, need)
    assert {number for number, _ in alive} == {4 * 16, 2 * 16}, "two micro-batches"


class Recording(ImportanceCriterion):
    """Remembers for which axes it was asked, and how often for saliencies."""

    name = "recording"
    summary = "the absolute weight"

    def __init__(self):
        super().__init__()
        self.axes, self.saliencies = [], 0

    def saliency(self, signals):
        self.saliencies += 1
        return signals.weight.abs()

    def score_units(self, signals, axis, index_UK):
        self.axes.append((axis.kind, axis.role, axis.axis, axis.reads, tuple(index_UK.shape)))


def test_a_criterion_gets_kind_and_role_of_every_axis_and_what_the_parameter_reads():
    loaded = make("llama-gqa")
    criterion = Recording()
    groups = [group for group in loaded.graph.groups if criterion.accepts(group.kind)]
    estimate(loaded.network, loaded.graph, groups, criterion, None)
    assert ("mlp", Role.PRODUCES, 0, {"hidden"}, (56, 1)) in criterion.axes
    assert ("mlp", Role.CONSUMES, 1, {"mlp"}, (56, 1)) in criterion.axes
    assert ("attention", Role.CONSUMES, 1, {"attention", "query"}, (3, 16)) in criterion.axes
    assert ("hidden", Role.NORM, 0, set(), (48, 1)) in criterion.axes
    assert ("hidden", Role.PRODUCES, 1, set(), (48, 1)) in criterion.axes
    assert ("layer", None, 0, {"hidden"}, (1, 56)) in criterion.axes
    assert criterion.saliencies == len(loaded.graph.shapes) < len(criterion.axes)


def effects(product):
    return {"squares": (product.inputs * product.input_grads).square().sum(0)}


def fast(monkeypatch, *, yes=True):
    monkeypatch.setattr("llmpruner.engine.walk.computes_bfloat16_fast", lambda model: yes)
    monkeypatch.setattr("llmpruner.engine.products.multiplies_bfloat16_fast", lambda device: yes)


def test_products_that_the_model_computes_without_gradients_are_left_out(monkeypatch):
    """As in the indexers of DeepSeek-V3.2."""
    loaded = make("llama-gqa")
    mlp = layers_of(loaded)[1].mlp
    monkeypatch.setattr(mlp, "forward", torch.no_grad()(mlp.forward))
    other = "model.layers.1.self_attn.o_proj.weight"
    found = signals_of(loaded, [DOWN, other], effects, Signal.PRODUCT_GRAD)
    assert found[DOWN].products is None and bool(found[other].products.sums["squares"].any())


def test_products_with_a_part_of_a_weight_are_left_out(monkeypatch):
    """As those with the experts of DBRX, which are rows of one matrix."""
    loaded = make("llama-gqa")
    mlp = layers_of(loaded)[1].mlp

    def forward(x):
        up = torch.cat([torch.nn.functional.linear(x, part) for part in mlp.up_proj.weight.split([20, 36])], -1)
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * up)

    monkeypatch.setattr(mlp, "forward", forward)
    found = signals_of(loaded, [UP, DOWN], effects, Signal.PRODUCT_GRAD)
    assert found[UP].products is None and bool(found[DOWN].products.sums["squares"].any())


# Rounding routes tokens of a mixtral to other experts.
@pytest.mark.parametrize(("name", "near"), [("llama-gqa", 0.05), ("gpt2", 0.05), ("mixtral", 0.2), ("gemma2", 0.05)])
def test_fast_products_with_gradients_stay_near(name, near, monkeypatch):
    loaded = make(name)
    names = [name for name, kinds in kinds_read(loaded.graph).items() if "mlp" in kinds]
    sums = {}
    for way in (False, True):
        fast(monkeypatch, yes=way)
        found = signals_of(loaded, names, effects, Signal.PRODUCT_GRAD)
        sums[way] = torch.cat([found[n].products.sums["squares"].flatten() for n in sorted(found)])
    difference = (sums[True] - sums[False]).norm() / sums[False].norm()
    assert 0 < float(difference) < near
    ranks = torch.stack([sums[way].argsort().argsort().double() for way in sums])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.99


def test_a_criterion_computes_in_float32_where_the_layer_does_not(monkeypatch):
    fast(monkeypatch)
    found = []
    signals_of(make("llama-gqa"), [DOWN], lambda p: found.append(p.inputs @ p.weight.T) or {}, Signal.PRODUCT)
    assert {outputs.dtype for outputs in found} == {torch.float32}


def test_fast_products_are_for_gradients_of_products_alone(monkeypatch):
    """Gradients of parameters are in the model's own precision."""
    loaded = make("llama-gqa")
    grads = []
    for way in (False, True):
        fast(monkeypatch, yes=way)
        grads.append(signals_of(loaded, [DOWN], effects, Signal.PRODUCT_GRAD, Signal.GRAD)[DOWN].grad)
    assert torch.equal(*grads)


def test_operators_that_refuse_autocast_have_gradients_in_the_models_precision(monkeypatch):
    """As those of DBRX, which add products in bfloat16 to float32."""
    loaded, name = make("llama-gqa"), "model.layers.0.mlp.down_proj.weight"
    mlp = layers_of(loaded)[1].mlp
    plain = mlp.forward

    def forward(x):
        return torch.zeros_like(x, dtype=torch.float32).index_add(1, torch.arange(x.shape[1]), plain(x))

    monkeypatch.setattr(mlp, "forward", forward)
    found = []
    for way in (False, True):
        fast(monkeypatch, yes=way)
        found.append(signals_of(loaded, [name], effects, Signal.PRODUCT_GRAD)[name].products.sums["squares"])
    assert torch.equal(*found)


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.square = nn.Parameter(torch.randn(5, 5, generator=generator))
        self.wide = nn.Parameter(torch.randn(7, 5, generator=generator))
        self.experts = nn.Parameter(torch.randn(3, 7, 5, generator=generator))
        self.bias = nn.Parameter(torch.randn(7, generator=generator))


WEIGHTS = Weights()
X = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
ROWS = X.flatten(0, 1)


def watch(module, compute):
    uses = []
    with torch.no_grad(), WatchProducts(module, [n for n, _ in module.named_parameters()], uses.append):
        compute(module)
    return uses


PRODUCTS = {
    "linear": lambda m: functional.linear(X, m.wide),
    "linear by keyword": lambda m: functional.linear(X, weight=m.wide),
    "operator": lambda m: X @ m.wide.T,
    "matmul": lambda m: torch.matmul(X, m.wide.T),
    "method": lambda m: X.matmul(m.wide.transpose(0, 1)),
    "mm": lambda m: torch.mm(ROWS, m.wide.T),
    "view": lambda m: functional.linear(X, m.wide[:]),
}


@pytest.mark.parametrize("how", PRODUCTS)
def test_a_matrix_is_seen_however_the_product_is_written(how):
    (use,) = watch(WEIGHTS, PRODUCTS[how])
    assert (use.parameter, use.axis, use.slot, use.bias) == ("wide", 1, None, None)
    torch.testing.assert_close(use.inputs, ROWS)
    torch.testing.assert_close(use.outputs, ROWS @ WEIGHTS.wide.detach().T)


def test_the_axis_of_a_square_matrix_is_told_by_its_strides():
    assert [use.axis for use in watch(WEIGHTS, lambda m: (X @ m.square, X @ m.square.T))] == [0, 1]


def test_the_bias_is_what_the_product_adds():
    (linear,) = watch(WEIGHTS, lambda m: functional.linear(X, m.wide, m.bias))
    (keyword,) = watch(WEIGHTS, lambda m: functional.linear(X, m.wide, bias=m.bias))
    (added,) = watch(WEIGHTS, lambda m: torch.addmm(m.bias, ROWS, m.wide.T))
    for use in (linear, keyword, added):
        assert use.bias is WEIGHTS.bias
        torch.testing.assert_close(use.outputs, ROWS @ WEIGHTS.wide.detach().T + WEIGHTS.bias.detach())


STACK = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2))
SLOTS = {
    "one expert, and another": (lambda m: (functional.linear(ROWS, m.experts[2]), ROWS @ m.experts[1].T), [2, 1]),
    "a batch of experts": (lambda m: torch.bmm(STACK, m.experts.mT), [0, 1, 2]),
    "some experts of a stack": (lambda m: torch.bmm(X, m.experts[1:].mT), [1, 2]),
    "inputs that all experts share": (lambda m: torch.matmul(ROWS, m.experts.mT), [0, 1, 2]),
}


@pytest.mark.parametrize("how", SLOTS)
def test_every_expert_is_a_slot(how):
    compute, slots = SLOTS[how]
    uses = watch(WEIGHTS, compute)
    assert [(use.parameter, use.axis, use.slot) for use in uses] == [("experts", 2, slot) for slot in slots]
    for use in uses:
        torch.testing.assert_close(use.outputs, use.inputs @ WEIGHTS.experts[use.slot].detach().T)


UNUSED = {
    # Which expert multiplies which rows cannot be told from the shapes.
    "inputs of more axes than the stack": lambda m: torch.matmul(X[:, None].expand(2, 3, 4, 5), m.experts.mT),
    # Its columns would be taken for the first ones of the whole matrix.
    "part of the inputs": lambda m: functional.linear(X[..., :3], m.wide[:, :3]),
    "a matrix viewed as a stack": lambda m: torch.bmm(X[:1], m.square.view(1, 5, 5)),
}


@pytest.mark.parametrize("what", UNUSED)
def test_what_cannot_be_told_is_no_use(what):
    assert watch(WEIGHTS, UNUSED[what]) == []


@pytest.mark.parametrize("how", ["matrix", "stack"])
def test_a_copy_stays_as_it_was_when_the_model_overwrites_its_tensors(how):
    inputs, before = X.clone(), X.clone()
    uses = []
    with torch.no_grad(), WatchProducts(WEIGHTS, ["wide", "experts"], lambda use: uses.append(use.copied())):
        result = functional.linear(inputs, WEIGHTS.wide) if how == "matrix" else inputs @ WEIGHTS.experts[:2].mT
        wanted = result.clone()
        result += 1
        inputs.mul_(2)
    for part, use in enumerate(uses):
        of = slice(None) if how == "matrix" else part
        assert torch.equal(use.inputs, before[of].flatten(0, -2))
        assert torch.equal(use.outputs, wanted[of].flatten(0, -2))


def test_parameters_in_one_storage_are_told_apart():
    """A checkpoint may be mapped into memory as a whole."""
    module = nn.Module()
    flat = torch.arange(40.0)
    module.first, module.second = nn.Parameter(flat[:20].view(4, 5)), nn.Parameter(flat[20:].view(4, 5))
    uses = watch(module, lambda m: (functional.linear(X, m.first), functional.linear(X, m.second)))
    assert [use.parameter for use in uses] == ["first", "second"]
