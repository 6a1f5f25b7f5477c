"""Criteria against their equations, worked out directly; units credited with what they own alone; blocks of layers."""

import copy
from dataclasses import replace
from itertools import pairwise
from math import pi
from typing import get_args

import pytest
import tiny_models
import torch
from criteria_cases import layers_of, make, observed, opened, tokens
from llmpruner_llama import LlamaFamily

import llmpruner
from llmpruner import Catalog, ImportanceCriterion
from llmpruner.calibration.written import self_generated
from llmpruner.engine.signals import InputStats, ParameterSignals, Signal, UnitAxis
from llmpruner.engine.walk import CalibrationSet
from llmpruner.errors import PluginError, SelectionError
from llmpruner.models.model import Model
from llmpruner.plugins.manager import PluginManager
from llmpruner.pruning.allocation import Normalization, normalized
from llmpruner.pruning.criteria.estimate import estimate, reduce_spans
from llmpruner.pruning.criteria.weights import L1, L2, OptimalBrainSurgeon, Taylor, Variant
from llmpruner.settings import Reduction
from llmpruner.structure.coupling import Role
from llmpruner.testing import settings_grid
from llmpruner.testing.components import label
from llmpruner.testing.criterion import scorable

pytestmark = pytest.mark.usefixtures("full_precision")

CALIBRATION = tokens(8, 24)
IDS = CALIBRATION.input_ids
CRITERIA = Catalog(PluginManager(entry_points=False))[ImportanceCriterion]
ALL = [criterion for cls in CRITERIA.values() for criterion in settings_grid(cls)]
OF_UNITS = [criterion for criterion in ALL if criterion.accepts("mlp")]


@pytest.fixture
def llama():
    return make("llama-gqa")


def scores_of(loaded, criterion, name: str) -> torch.Tensor:
    group = loaded.graph.by_name[name]
    return estimate(loaded.network, loaded.graph, [group], criterion, CALIBRATION)[name]


def principal(x: torch.Tensor) -> torch.Tensor:
    """Energy of each channel in the fewest components that hold 99 % of it."""
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    values, vectors = values.flip(0), vectors.flip(1)
    count = 1 + int((values.cumsum(0) < 0.99 * values.sum()).sum())
    return (vectors[:, :count].square() * values[:count]).sum(1)


EQUATIONS = {
    "wanda-sp": lambda w, x: w.abs().sum(0) * x.square().mean(0).sqrt(),
    "energy": lambda w, x: w.square().sum(0) * x.square().mean(0),
    "flap": lambda w, x: w.square().sum(0) * x.var(0, correction=0),
    "activation": lambda w, x: x.square().mean(0),
    "pca": lambda w, x: principal(x),
}
PLACES = [
    ("llama-gqa", "layers.1.mlp", "model.layers.1.mlp.down_proj", 1),
    ("llama-gqa", "layers.1.attention", "model.layers.1.self_attn.o_proj", 16),
    ("gpt2", "layers.1.mlp", "transformer.h.1.mlp.c_proj", 1),
]
"""Model, group, the module that reads its units, and how many of the inputs are a unit."""


@pytest.mark.parametrize(("model", "group", "path", "width"), PLACES)
@pytest.mark.parametrize("name", EQUATIONS)
def test_criteria_of_activations_follow_their_equations(name, model, group, path, width):
    loaded = make(model)
    weight = matrix(loaded.network.get_submodule(path)).detach().double()
    expected = EQUATIONS[name](weight, observed(loaded.network, path, IDS)[0]).view(-1, width).sum(1)
    torch.testing.assert_close(scores_of(loaded, CRITERIA[name](), group), expected, rtol=1e-3, atol=1e-7)


def matrix(module: torch.nn.Module) -> torch.Tensor:
    """The weight as (out, in)."""
    return module.weight if isinstance(module, torch.nn.Linear) else module.weight.T


def fisher_of(loaded, path: str, width: int) -> torch.Tensor:
    """The mean over samples of Σ_t (Σ_j x_tj · W_:jᵀg_t)² for units of ``width`` inputs, by autograd over the whole
    model, one sample at a time."""
    module = loaded.network.get_submodule(path)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = module.register_forward_hook(lambda _, a, out: seen.append((a[0][0], out)))
    total = 0.0
    for row in IDS:
        loss = loaded.network(input_ids=row[None], labels=row[None], use_cache=False).loss
        x, out = seen.pop()
        (gradient,) = torch.autograd.grad(loss, out)
        effects = (x * (gradient[0] @ matrix(module))).double().view(len(x), -1, width).sum(-1)
        total = total + effects.square().sum(0).detach() / len(IDS)
    handle.remove()
    return total


@pytest.mark.parametrize(("model", "group", "path", "width"), PLACES)
def test_fisher_is_that_of_autograd(model, group, path, width):
    loaded = make(model)
    found = scores_of(loaded, CRITERIA["fisher"](), group)
    torch.testing.assert_close(found, fisher_of(loaded, path, width), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("model", "layers", "module"), [
    ("llama-gqa", "model.layers", "mlp.down_proj"), ("gpt2", "transformer.h", "mlp.c_proj")
])  # fmt: skip
def test_in_the_last_layer_fisher_counts_what_a_channel_adds_to_a_single_logit(model, layers, module):
    loaded = make(model)
    number = loaded.graph.num_layers - 1
    path = f"{layers}.{number}.{module}"
    with torch.no_grad():
        head = loaded.network.get_output_embeddings().weight
        peaks = ((head - head.mean(0)) @ matrix(loaded.network.get_submodule(path))).abs().amax(0).square()
    expected = fisher_of(loaded, path, 1) * peaks / peaks.mean()
    found = scores_of(loaded, CRITERIA["fisher"](), f"layers.{number}.mlp")
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0, check_dtype=False)  # rows of the head in bfloat16


def columns(axis: int) -> UnitAxis:
    return UnitAxis("mlp", Role.CONSUMES, axis, frozenset({"mlp"}))


def obs_problem(units: int, width: int = 1, seed: int = 0, ridge: float = 0.01):
    generator = torch.Generator().manual_seed(seed)
    inside = units * width
    x = torch.randn(200, inside, generator=generator) @ torch.randn(inside, inside, generator=generator)
    weight = torch.randn(5, inside, generator=generator)
    gram = (x.T @ x / len(x)).double()
    strength = ridge * float(gram.diagonal().mean())
    stats = InputStats(x.mean(0)[None], x.square().mean(0)[None], 1, gram.float())
    signals = ParameterSignals(weight, None, None, generator, stats)
    return signals, gram + strength * torch.eye(inside, dtype=torch.float64), torch.arange(inside).view(units, width)


def refit_error(weight: torch.Tensor, hessian: torch.Tensor, gone: list[int]) -> float:
    """The least squared error, ridge included, of a weight without some of its inputs."""
    weight = weight.double()
    stay = [i for i in range(weight.shape[1]) if i not in gone]
    new = torch.zeros_like(weight)
    new[:, stay] = torch.linalg.solve(hessian[stay][:, stay], hessian[stay] @ weight.T).T
    return float(((weight - new) @ hessian * (weight - new)).sum())


@pytest.mark.parametrize(("width", "ridge"), [(1, 0.01), (3, 1.0)])
def test_obs_is_the_error_after_the_best_repair(width, ridge):
    signals, hessian, index = obs_problem(6, width, ridge=ridge)
    scores = OptimalBrainSurgeon(ridge=ridge).score_units(signals, columns(1), index)
    order = scores.argsort().tolist()
    gone: list[int] = []
    for unit in order:
        errors = {u: refit_error(signals.weight, hessian, gone + index[u].tolist()) for u in range(6) if
                  not set(index[u].tolist()) <= set(gone)}  # fmt: skip
        assert min(errors, key=errors.get) == unit, "greedy: always the unit whose removal leaves the least error"
        assert float(scores[unit]) == pytest.approx(errors[unit], rel=1e-3)
        gone += index[unit].tolist()


def test_the_share_of_pca_is_a_setting(llama):
    """With all the energy, the components add up to the mean square of every channel."""
    group, path = "layers.1.mlp", "model.layers.1.mlp.down_proj"
    whole = scores_of(llama, CRITERIA["pca"](share=1.0), group)
    torch.testing.assert_close(whole, observed(llama.network, path, IDS)[0].square().mean(0), rtol=1e-3, atol=1e-7)
    assert bool((scores_of(llama, CRITERIA["pca"](share=0.5), group) < whole).all())


def test_obs_of_a_stack_removes_units_of_one_number_together():
    first, one, index = obs_problem(4, seed=1)
    second, other, _ = obs_problem(4, seed=2)
    weight = torch.stack([first.weight, second.weight])
    grams = torch.stack([first.inputs.gram, second.inputs.gram])
    stack = InputStats(torch.zeros(2, 1, 4), torch.ones(2, 1, 4), 2, grams)
    signals = ParameterSignals(weight, None, None, first.generator, stack)
    scores = OptimalBrainSurgeon().score_units(signals, columns(2), index)
    unit = int(scores.argmin())
    together = [refit_error(weight[0], one, [u]) + refit_error(weight[1], other, [u]) for u in range(4)]
    assert unit == together.index(min(together))
    assert float(scores[unit]) == pytest.approx(min(together), rel=1e-3)


def test_criteria_of_layers_compare_hidden_states(llama):
    before = [observed(llama.network, f"model.layers.{n}.input_layernorm", IDS)[0] for n in range(3)]
    before.append(observed(llama.network, "model.norm", IDS)[0])
    cosines = [torch.cosine_similarity(a, b, dim=-1) for a, b in pairwise(before)]
    influence = torch.stack([1 - c.mean() for c in cosines])
    angle = torch.stack([c.arccos().mean() / pi for c in cosines])
    torch.testing.assert_close(scores_of(llama, CRITERIA["block-influence"](), "layers"), influence, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores_of(llama, CRITERIA["angular"](), "layers"), angle, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "advice"), [("block-influence", "; use --kinds layer"), ("expert-reap", ", nor others")]
)
def test_units_that_a_criterion_does_not_score_are_refused(llama, name, advice):
    with pytest.raises(SelectionError, match=f"{name} does not score 'mlp' units{advice}"):
        scores_of(llama, CRITERIA[name](), "layers.1.mlp")


@pytest.mark.parametrize(
    ("given", "shown"), [(lambda w: w.sum(1, keepdim=True), r"\(48, 1\)"), (lambda _: None, "NoneType")]
)
def test_a_saliency_of_another_shape_is_an_error_that_names_the_criterion(llama, monkeypatch, given, shown):
    monkeypatch.setattr(L1, "saliency", lambda self, signals: given(signals.weight))
    with pytest.raises(PluginError, match=f"criterion l1 gave {shown} for model.layers.1.mlp.* expected shape"):
        scores_of(llama, L1(), "layers.1.mlp")


def test_units_that_a_criterion_cannot_tell_apart_are_a_warning(llama, monkeypatch, caplog):
    scores_of(llama, CRITERIA["energy"](), "layers.1.mlp")
    assert "apart" not in caplog.text
    monkeypatch.setattr("llmpruner.engine.products._PRODUCTS", {})
    scores_of(llama, CRITERIA["energy"](), "layers.1.mlp")
    assert "energy cannot tell the units of 1 group apart ('layers.1.mlp' …), so the first ones go" in caplog.text


@pytest.mark.parametrize("criterion", [c for c in OF_UNITS if c.name not in ("random", "activation", "pca")], ids=label)
def test_a_kv_group_counts_its_own_query_heads_alone(llama, criterion):
    """Planted: what o_proj reads from the two query heads of KV head 1. Only that group's score may change, with
    everything else that is measured, inputs and gradients, as good as constant: the last layer, a tiny plant."""
    group = "layers.2.attention"
    weight = layers_of(llama)[2].self_attn.o_proj.weight
    before = scores_of(llama, criterion, group)
    with torch.no_grad():
        weight[:, 16:32] *= 1.01
    after = scores_of(llama, criterion, group)
    change = (after / before - 1).abs()
    assert int(change.argmax()) == 1
    if not {Signal.GRAD, Signal.GRAD_SQ, Signal.PRODUCT_GRAD} & criterion.needs and criterion.name != "obs":
        torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "gpt_oss", "glm"])
def test_every_criterion_scores_every_kind(model):
    """Of a LLaMA and a mixture, the kit of criteria does."""
    loaded = make(model)
    for criterion in ALL:
        groups = scorable(loaded.graph, criterion)
        scores = estimate(loaded.network, loaded.graph, groups, criterion, tokens(2, 12))
        for group in groups:
            values = scores[group.name]
            assert values.shape == (group.units,)
            assert bool(values.isfinite().all())
            assert len(set(values.tolist())) > 1, f"{label(criterion)} on {model} {group.name}: all alike"


NORMALIZATIONS = get_args(Normalization)


def test_normalizations_follow_their_equations():
    values = torch.tensor([3.0, 1, 2]).double()
    found = {how: normalized(values, how, 100).tolist() for how in NORMALIZATIONS}
    assert found["none"] == [3, 1, 2]
    assert found["mean"] == [1.5, 0.5, 1]
    assert found["max"] == pytest.approx([1, 1 / 3, 2 / 3])
    assert found["sum"] == pytest.approx([0.5, 1 / 6, 1 / 3])
    assert found["zscore"] == pytest.approx([1.5**0.5, -(1.5**0.5), 0])
    assert found["parameters"] == pytest.approx([0.03, 0.01, 0.02])


@pytest.mark.parametrize("how", NORMALIZATIONS)
@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0], [-3.0, 1.0, -2.0], [0.0, 0.0, 0.0]])
def test_normalization_keeps_the_order(how, values):
    result = normalized(torch.tensor(values).double(), how, 100)
    assert bool(result.isfinite().all())
    assert result.argsort(stable=True).tolist() == torch.tensor(values).argsort(stable=True).tolist()


FIRST, SECOND = 2, 3
"""Two layers that undo one another."""
LITTLE_TEXT = {"samples": 4, "length": 24, "kinds": "layer"}


@pytest.fixture(scope="module")
def planted() -> Model:
    model = tiny_models.llama(layers=6)
    loaded = opened(model, LlamaFamily())
    shift = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for number, sign in ((FIRST, 1), (SECOND, -1)):
            layer = model.model.layers[number]
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.register_forward_hook(lambda _, __, out, sign=sign: out + sign * shift)
    return loaded


def removed(loaded: Model, importance: str, **settings) -> list[int]:
    plan = llmpruner.plan(loaded, importance=importance, **LITTLE_TEXT, **settings)
    return sorted(set(range(6)) - set(plan.cuts["layers"].kept))


def test_a_block_that_changes_nothing_goes_although_its_layers_do(planted):
    """Each of the two alone is the last that other criteria would remove; without both the model is the same."""
    for amount in ({"unit_ratio": 1 / 3}, {"ratio": 1 / 3}):
        assert removed(planted, "angular-block", layers="all", **amount) == [FIRST, SECOND]
        assert not {FIRST, SECOND} & set(removed(planted, "angular", layers="all", **amount))
    ids = torch.arange(3, 23)[None]
    whole = replace(planted, network=copy.deepcopy(planted.network))
    pruned = llmpruner.prune(whole, importance="angular-block", layers="all", unit_ratio=1 / 3, **LITTLE_TEXT)
    with torch.no_grad():
        torch.testing.assert_close(pruned.network(ids).logits, planted.network(ids).logits)


def test_the_block_is_of_layers_that_may_go(planted):
    assert removed(planted, "angular-block", layers="3-5", unit_ratio=2 / 3) in ([3, 4], [4, 5])
    with pytest.raises(SelectionError, match="no 2 successive layers may be removed"):
        removed(planted, "angular-block", layers="0,2,4", unit_ratio=2 / 3)


# Weights and gradients


def saliency(variant, w, g, h):
    first, second = w * g, 0.5 * w.square() * h
    return {"element1": first.abs(), "element2": second, "mix": (first - second).abs(), "vector": first}[variant]


@pytest.mark.parametrize("variant", get_args(Variant))
def test_taylor_follows_the_paper(gqa, variant):
    """With gradients of one sample at a time, by plain autograd."""
    calibration = CalibrationSet(self_generated(gqa.network, None, 4, 12, 3), "self")
    mlp = gqa.network.model.layers[2].mlp
    weights, axes = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight], (0, 0, 1)
    losses = (gqa.network(row[None], labels=row[None]).loss for row in calibration.input_ids)
    samples = [torch.autograd.grad(loss, weights) for loss in losses]
    expected = torch.zeros(96, dtype=torch.float64)
    for weight, axis, grads in zip(weights, axes, map(torch.stack, zip(*samples, strict=True)), strict=True):
        found = saliency(variant, weight.detach(), grads.mean(0), grads.square().mean(0))
        expected += found.double().sum(1 - axis).abs()
    group = gqa.graph.by_name["layers.2.mlp"]
    scores = estimate(gqa.network, gqa.graph, [group], Taylor(variant=variant), calibration)
    torch.testing.assert_close(scores["layers.2.mlp"], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(("criterion", "power"), [(L1(), 1), (L2(), 2)])
def test_magnitudes_are_reduced_over_spans(gqa, criterion, power):
    mlp = gqa.network.model.layers[1].mlp
    parts = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T]
    spans = torch.stack([p.detach().double().abs().pow(power).sum(1) for p in parts])
    group = gqa.graph.by_name["layers.1.mlp"]
    reduced = {"sum": spans.sum(0), "mean": spans.mean(0), "max": spans.amax(0), "last": spans[-1]}
    reduced["prod"] = spans.prod(0) ** (1 / 3)
    assert set(reduced) == set(get_args(Reduction))
    for name, expected in reduced.items():
        scores = estimate(gqa.network, gqa.graph, [group], criterion, None, reduction=name)
        torch.testing.assert_close(scores[group.name], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_a_product_of_many_spans_is_neither_zero_nor_infinite(scale):
    """The residual stream of the demo model has 273 spans."""
    scores = scale * torch.rand(273, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = reduce_spans(scores, "prod")
    assert torch.equal(found.argsort(), (scores / scale * 2.7).prod(0).argsort())
    torch.testing.assert_close(found / scale, (scores / scale * 2.7).prod(0) ** (1 / 273) / 2.7)
    scores[3, 1], scores[4, 2] = 0.0, -scores[4, 2]
    found = reduce_spans(scores, "prod")
    assert found[1] == 0 and found[2] < 0 < found[3]


def test_a_tied_embedding_counts_once(loaded):
    group = loaded.graph.by_name["hidden"]
    scores = estimate(loaded.network, loaded.graph, [group], L1(), None)["hidden"]
    axes = {(s.parameter, s.axis) for s in group.spans if s.parameter not in loaded.graph.ties}
    expected = torch.zeros(64, dtype=torch.float64)
    for name, axis in axes:
        weight = loaded.network.get_parameter(name).detach().double().abs()
        expected += weight.sum([a for a in range(weight.dim()) if a != axis]) if weight.dim() > 1 else weight
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=0)


def test_a_layer_scores_everything_in_it(gqa):
    scores = estimate(gqa.network, gqa.graph, [gqa.graph.by_name["layers"]], L1(), None)["layers"]
    expected = [sum(p.detach().double().abs().sum() for p in layer.parameters()) for layer in gqa.network.model.layers]
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-5, atol=0)
