"""The exact oracle: a cut model gives the logits of the original with the removed units silenced."""

import copy
from dataclasses import replace
from functools import partial, reduce

import pytest
import torch
from torch import nn

from llmpruner import HIDDEN, MLP, QUERY, Blocks, CoupledGroup, Role, Span
from llmpruner.discovery.cut import cut
from llmpruner.discovery.oracle import logits, random_plan, silenced
from llmpruner.errors import CouplingError, PlanError
from llmpruner.models.surgery import CutValues, cut_tensors, silence
from llmpruner.structure.coupling import CouplingGraph, Explicit
from llmpruner.structure.kept import check_kept, compose, restrict
from llmpruner.structure.plan import structure_of


def some(graph, kinds, seed):
    """A random choice of units, another in every group."""
    return random_plan(graph.of_kinds(kinds), seed, uneven=True)


def assert_exact(loaded, kept, graph=None):
    """Copies of the model, cut and silenced, have the same logits with each attention; returns how far these are from
    those of the whole model."""
    graph = graph or loaded.graph
    loaded.network.double()  # in float32, sums of other lengths differ by up to 1.05e-5 on some processors
    without, smaller = copy.deepcopy(loaded.network), copy.deepcopy(loaded.network)
    silence(without, graph, kept)
    cut(smaller, graph, kept, loaded.family)
    ids = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    for attention in ("eager", "sdpa"):
        for model in (without, smaller):
            model.set_attn_implementation(attention)
        expected = logits(without, ids)
        torch.testing.assert_close(logits(smaller, ids), expected, atol=1e-5, rtol=1e-5)
    return float((expected - logits(loaded.network, ids)).abs().max())


@pytest.mark.parametrize("kinds", [("mlp",), ("attention",), ("hidden",), ("mlp", "attention", "hidden")], ids="+".join)
def test_a_cut_equals_silencing(loaded, kinds):
    change = assert_exact(loaded, some(loaded.graph, kinds, seed=len(kinds)))
    assert change > 0.1, "the cut must be visible, or equality proves nothing"


@pytest.mark.parametrize("kind", ["mlp", "attention", "query", "hidden"])
def test_one_unit_may_be_left(loaded, kind):
    groups = loaded.graph.of_kinds([kind])
    assert_exact(loaded, {g.name: range(0, g.units, g.units // g.blocks) for g in groups})


@pytest.mark.parametrize(
    "cuts",
    [
        [{"layers.1.attention": [0, 2, 3]}, {"layers.1.query": [0, 3, 4]}],
        [{"layers.1.attention": [1, 3], "layers.1.query": [1, 2, 4, 6]}, {"layers.1.attention": [1]}],
        [
            {"layers.1.attention": [0, 2, 3], "layers.0.mlp": range(9)},
            {"layers": [1, 3]},
            {"layers.0.query": [1, 2, 5], "layers.1.query": [1, 3, 4, 6]},
            {"layers.0.attention": [2], "layers.0.mlp": range(5, 40)},
        ],
    ],
    ids=["query heads later", "both first", "across layers"],
)
def test_successive_cuts_are_one_cut(gqa, cuts):
    """One that keeps query heads in the blocks of removed KV heads, too, as a plan of one step does. One query head
    must stay in each KV head that is left, not as many as there were KV heads once."""
    graph, smaller = gqa.graph, copy.deepcopy(gqa.network)
    for kept in cuts:
        graph = cut(smaller, graph, kept, gqa.family)
    at_once = reduce(partial(compose, gqa.graph), cuts, {})
    check_kept(gqa.graph, at_once)
    assert restrict(gqa.graph, at_once).shapes == graph.shapes
    again = copy.deepcopy(gqa.network)
    cut(again, gqa.graph, at_once, gqa.family)
    ids = torch.arange(9)[None]
    with silenced(gqa.network, gqa.graph, at_once):
        assert torch.equal(logits(again, ids), logits(smaller, ids))
        torch.testing.assert_close(logits(smaller, ids), logits(gqa.network, ids), atol=1e-5, rtol=1e-5)


def test_the_graph_follows_the_cut(loaded):
    kept = some(loaded.graph, ("mlp", "attention", "layer", "hidden"), seed=9)
    remaining = cut(loaded.network, loaded.graph, kept, loaded.family)
    assert remaining == restrict(loaded.graph, kept)
    shapes = {n: tuple(p.shape) for n, p in loaded.network.named_parameters(remove_duplicate=False)}
    assert dict(remaining.shapes) == shapes
    assert_exact(loaded, {g.name: range(g.minimum) for g in remaining.of_kinds(["mlp", "attention"])}, remaining)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"layers.9.mlp": [0]}, "'layers.9.mlp', which this model does not have"),
        ({"layers.1.mlp": [3, 2]}, "increasing and within 0…95"),
        ({"layers.1.mlp": [96]}, "increasing and within 0…95"),
        ({"layers.1.attention": []}, "must keep at least 1"),
        ({"layers.1.query": [0, 1, 2, 4, 6]}, "same number of units in each of its 4 blocks"),
    ],
)
def test_a_cut_that_breaks_a_constraint_is_refused(gqa, kept, message):
    before = copy.deepcopy(gqa.network.state_dict())
    with pytest.raises(PlanError, match=message):
        cut(gqa.network, gqa.graph, kept, gqa.family)
    assert all(torch.equal(before[name], tensor) for name, tensor in gqa.network.state_dict().items())


def test_heads_under_a_norm_are_silenced_in_what_reads_them_too():
    """A query of zeros attends to all positions alike: its head still has an output, the mean of the values."""
    spans = (
        Span("layers.0.q.weight", 0, Role.PRODUCES, Blocks(4, 2)),
        Span("layers.0.norm.weight", 0, Role.NORM, Blocks(4, 2)),
        Span("layers.0.out.weight", 1, Role.CONSUMES, Blocks(4, 2)),
    )
    parts = {"q": nn.Linear(3, 8, bias=False), "norm": nn.RMSNorm(8), "out": nn.Linear(8, 3, bias=False)}
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(parts)])})
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    group = CoupledGroup("query", QUERY, 4, spans, blocks=2, layer=0)
    silence(model, CouplingGraph((group,), shapes, "layers"), {"layers.0.query": [0, 3]})
    for weight in (parts["q"].weight, parts["out"].weight.T):
        assert [bool(row.any()) for row in weight.reshape(4, 2, 3)] == [True, False, False, True]


def test_a_norm_over_two_copies_of_the_units_is_rescaled_once():
    """As in Zamba2, whose shared blocks read the residual stream and the embeddings side by side."""
    both = Explicit(tuple((n, n + 6) for n in range(6)))
    spans = (
        Span("layers.0.up.weight", 0, Role.PRODUCES, Blocks(6)),
        *(Span("layers.0.norm.weight", 0, Role.NORM, Blocks(6, 1, start)) for start in (0, 6)),
        Span("layers.0.out.weight", 1, Role.CONSUMES, both),
    )
    parts = {"up": nn.Linear(3, 6), "norm": nn.RMSNorm(12, eps=0.1), "out": nn.Linear(12, 3)}
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(parts)])})
    spans = (*spans, Span("layers.0.up.bias", 0, Role.PRODUCES, Blocks(6)))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    graph = CouplingGraph((CoupledGroup("hidden", HIDDEN, 6, spans, layer=0),), shapes, "layers")
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))

    def outputs(model):
        layer = model["layers"][0]
        up = layer["up"](x)
        return layer["out"](layer["norm"](torch.cat([up, up], -1)))

    silenced = copy.deepcopy(model)
    silence(silenced, graph, {"layers.0.hidden": [0, 2, 5]})
    cut_tensors(model, graph, {"layers.0.hidden": [0, 2, 5]})
    assert torch.allclose(outputs(model), outputs(silenced), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_rescaled_norm_is_rounded_once(dtype):
    """A weight w that is used as 1 + w, as in Gemma, has more digits than 1 + w in 16 bits."""
    span = Span("norm.weight", 0, Role.NORM, Blocks(64), offset=1.0)
    graph = CouplingGraph((CoupledGroup("hidden", HIDDEN, 64, (span,)),), {"norm.weight": (64,)}, "layers")
    weight = torch.linspace(-0.02, 0.02, 64, dtype=torch.float64).to(dtype)
    found = CutValues(graph, {"hidden": tuple(range(60))}).of("norm.weight", weight)
    expected = (1 + weight[:60].double()) * (64 / 60) ** 0.5 - 1
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_layers_that_share_weights_are_cut_together():
    """As in Zamba: the group of the first such layer names its own tensors alone."""
    layers = [nn.ModuleDict({"norm": nn.RMSNorm(6, eps=0.1), "out": nn.Linear(6, 3)}) for _ in range(2)]
    layers[1]["out"].weight, layers[1]["norm"].weight = layers[0]["out"].weight, layers[0]["norm"].weight
    model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
    spans = (
        Span("layers.0.norm.weight", 0, Role.NORM, Blocks(6)),
        Span("layers.0.out.weight", 1, Role.CONSUMES, Blocks(6)),
    )
    named = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(p.shape) for name, p in named.items()}
    ties = {f"layers.1.{name}.weight": f"layers.0.{name}.weight" for name in ("norm", "out")}
    graph = CouplingGraph((CoupledGroup("mlp", MLP, 6, spans, layer=0),), shapes, "layers", ties)
    remaining = cut_tensors(model, graph, {"layers.0.mlp": [1, 2, 4]})
    for name in ("norm", "out"):
        first, second = (layer[name] for layer in layers)
        assert first.weight is second.weight and first.weight.shape[-1] == 3
        assert remaining.shapes[f"layers.1.{name}.weight"] == tuple(second.weight.shape)
    assert all(abs(layer["norm"].eps - 0.2) < 1e-9 for layer in layers) and layers[1]["out"].in_features == 3


BUFFER = Span("layers.0.table", 0, Role.PRODUCES, Blocks(3, width=2))
WEIGHT = Span("layers.0.weight", 1, Role.CONSUMES, Blocks(3, width=2))


def with_table():
    layer = nn.Linear(6, 4, bias=False)
    layer.register_buffer("table", torch.arange(6.0), persistent=False)
    return nn.ModuleDict({"layers": nn.ModuleList([layer])})


def graph_of(*buffers):
    group = CoupledGroup("mlp", "mlp", 3, (WEIGHT,), buffers=buffers, layer=0)
    return CouplingGraph((group,), {"layers.0.weight": (4, 6)}, "layers", buffers={"layers.0.table": (6,)})


def test_buffers_keep_the_entries_of_the_units_that_stay():
    tiny = with_table()
    remaining = cut_tensors(tiny, graph_of(BUFFER), {"layers.0.mlp": [0, 2]})
    layer = tiny["layers"][0]
    assert layer.table.tolist() == [0.0, 1.0, 4.0, 5.0]
    assert not isinstance(layer.table, nn.Parameter)
    assert layer.weight.shape == (4, 4)
    assert "layers.0.table" in tiny.state_dict(), "computed anew, it would have the entries of all units again"
    assert remaining == restrict(graph_of(BUFFER), {"layers.0.mlp": [0, 2]})
    assert remaining.buffers == {"layers.0.table": (4,)}
    assert remaining.groups[0].buffers == (replace(BUFFER, index=Blocks(2, width=2)),)
    cut_tensors(tiny, remaining, {"layers.0.mlp": [1]})
    assert layer.table.tolist() == [4.0, 5.0]
    untouched = with_table()
    cut_tensors(untouched, graph_of(), {"layers.0.mlp": [0, 2]})
    assert untouched["layers"][0].table.tolist() == list(range(6))
    assert "layers.0.table" not in untouched.state_dict()


def test_units_under_a_norm_are_silenced_in_buffers_too():
    norm = Span("layers.0.weight", 1, Role.NORM, Blocks(3, width=2))
    group = CoupledGroup("hidden", "hidden", 3, (norm,), buffers=(BUFFER,), layer=0)
    tiny = with_table()
    silence(tiny, replace(graph_of(), groups=(group,)), {"layers.0.hidden": [0, 2]})
    assert tiny["layers"][0].table.tolist() == [0.0, 1.0, 0.0, 0.0, 4.0, 5.0]


def test_buffers_do_not_count():
    with_buffer, without = graph_of(BUFFER), replace(graph_of(), buffers={})
    assert structure_of(with_buffer) == structure_of(without)
    assert with_buffer.total_parameters == with_buffer.decoder_parameters == 24
    assert restrict(with_buffer, {"layers.0.mlp": [0]}).total_parameters == 8
    assert with_buffer.parameters_per_unit(with_buffer.groups[0]) == without.parameters_per_unit(without.groups[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameter": "layers.0.other"}, "the model has no buffer 'layers.0.other'"),
        ({"axis": 1}, "has no axis 1"),
        ({"index": Blocks(3, width=2, start=1)}, "outside the axis of size 6"),
        ({"index": Blocks(2, width=2)}, "maps 2 units, not 3"),
    ],
)
def test_a_wrong_span_of_a_buffer_is_refused(change, message):
    with pytest.raises(CouplingError, match=message):
        graph_of(replace(BUFFER, **change))
