"""Selection hits the amount within one unit and obeys every constraint."""

from __future__ import annotations

import pytest
import torch

from llmpruner import Blocks, CoupledGroup, Role, Span
from llmpruner.errors import SelectionError, UnknownNameError
from llmpruner.pruning.allocation import GlobalRanking, Uniform
from llmpruner.pruning.budgets import counts, parameter_cost
from llmpruner.pruning.selection import select
from llmpruner.pruning.targets import Demand
from llmpruner.structure.kept import restrict
from llmpruner.structure.scope import Scope, build_queue
from llmpruner.structure.widths import Widths

ALL = (0, 1, 2, 3)


def scores_for(groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.units, generator=generator, dtype=torch.float64) for g in groups}


def choose(graph, kinds, demand, layers=ALL, allocation=Uniform, **options):
    scope = Scope(kinds, layers)
    groups = scope.groups(graph)
    return select(graph, groups, scores_for(groups), scope, demand, allocation(), **options)


@pytest.mark.parametrize("allocation", [Uniform, GlobalRanking], ids=lambda cls: cls.name)
@pytest.mark.parametrize(
    "kinds",
    [("mlp",), ("mlp", "attention"), ("mlp", "query", "attention"), ("hidden",), ("layer", "mlp")],
    ids="+".join,
)
@pytest.mark.parametrize("ratio", [0.07, 0.2, 0.45])
@pytest.mark.parametrize("loaded", ["gqa", "mha"], indirect=True)
def test_the_amount_is_hit_within_one_unit(loaded, kinds, ratio, allocation):
    graph = loaded.graph
    if "query" in kinds and "query" not in graph.kinds:
        kinds = tuple(k for k in kinds if k != "query")
    target = round(ratio * graph.decoder_parameters)
    kept = choose(graph, kinds, Demand(amount=target), allocation=allocation)
    removed = graph.decoder_parameters - restrict(graph, kept).decoder_parameters
    finest = min(graph.parameters_per_unit(g) for g in graph.of_kinds(kinds))
    assert abs(removed - target) <= finest


def test_uniform_takes_the_least_important_of_every_group(gqa):
    scope = Scope(("mlp",), (1, 2))
    groups = scope.groups(gqa.graph)
    scores = scores_for(groups)
    kept = select(gqa.graph, groups, scores, scope, Demand(units={g.name: 24.0 for g in groups}), Uniform())
    for group in groups:
        order = scores[group.name].argsort(stable=True)
        assert set(kept[group.name]) == set(order[24:].tolist())
    assert set(kept) == {"layers.1.mlp", "layers.2.mlp"}


def test_global_ranking_takes_the_least_important_of_all(gqa):
    scope = Scope(("mlp",), ALL)
    groups = scope.groups(gqa.graph)
    scores = scores_for(groups)
    unit = gqa.graph.parameters_per_unit(groups[0])
    kept = select(gqa.graph, groups, scores, scope, Demand(amount=50 * unit), GlobalRanking())
    everything = sorted((float(s), g.name, u) for g in groups for u, s in enumerate(scores[g.name]))
    gone = {(name, unit) for name, units in kept.items() for unit in set(range(96)) - set(units)}
    assert gone == {(name, unit) for _, name, unit in everything[:50]}


def test_query_heads_go_evenly_and_each_group_keeps_its_minimum(gqa):
    kept = choose(gqa.graph, ("query",), Demand(units={f"layers.{n}.query": 7.9 for n in ALL}))
    assert all([u // 2 for u in units] == [0, 1, 2, 3] for units in kept.values())


def test_a_multiple_and_a_minimum_of_the_group_itself_hold():
    spans = (Span("w", 0, Role.PRODUCES, Blocks(30)),)
    group = CoupledGroup("g", "mlp", 30, spans, multiple=8, minimum=9)
    queue = build_queue(group, [float(u) for u in range(30)], multiple=Widths().multiple(group))
    assert [30 - queue.removed_after(n) for n in range(len(queue.steps) + 1)] == [30, 24, 16]


def test_ties_are_broken_by_unit_number():
    queue = build_queue(CoupledGroup("g", "mlp", 4, (Span("w", 0, Role.PRODUCES, Blocks(4)),)), [1.0, 1.0, 0.0, 1.0])
    assert queue.steps == ((2,), (0,), (1,))


def test_a_demand_that_cannot_be_met_is_refused_with_the_most_that_can(gqa):
    with pytest.raises(SelectionError, match=r"cannot remove [\d,]+ decoder parameters: .* at most [\d,]+; select"):
        choose(gqa.graph, ("attention",), Demand(amount=round(0.9 * gqa.graph.decoder_parameters)))
    assert choose(gqa.graph, ("mlp",), Demand(amount=10)) == {}
    with pytest.raises(UnknownNameError, match="did you mean attention"):
        choose(gqa.graph, ("atention",), Demand(amount=10))


def test_sizes_agree_with_index_sets_where_groups_overlap(gqa):
    groups = gqa.graph.of_kinds(["attention", "query", "hidden", "mlp"])
    kept = {"layers.1.attention": [0, 2], "layers.1.query": [0, 3, 4, 7], "hidden": range(40), "layers.2.mlp": range(5)}
    kept = {name: list(units) for name, units in kept.items()}
    numbers = {name: len(units) for name, units in kept.items()}
    assert counts(gqa.graph, kept) == (numbers, set())
    left = [parameter_cost(gqa.graph, groups, decoder=decoder).remaining(numbers) for decoder in (False, True)]
    after = restrict(gqa.graph, kept)
    assert left == [after.total_parameters, after.decoder_parameters]


def test_numbers_of_units_do_not_count_what_another_group_took(gqa):
    kept = {"layers.1.attention": [0, 2], "layers.1.query": [0, 5], "layers": [0, 1, 3]}
    assert counts(gqa.graph, kept) == ({"layers.1.attention": 2, "layers.1.query": 4}, {2})
