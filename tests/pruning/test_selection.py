"""Selection hits the amount within one unit and obeys every constraint; `Sensitivity` removes most where the loss of a
model that is really cut rises least."""

import copy

import pytest
import torch
from torch.nn import functional

import llmpruner
from llmpruner import ModelError
from llmpruner.discovery.cut import cut
from llmpruner.discovery.oracle import logits
from llmpruner.engine.walk import CalibrationSet
from llmpruner.pruning.allocation import Allocation, GlobalRanking, Sensitivity, Uniform, top_up
from llmpruner.pruning.selection import Demand, select, trial_loss
from llmpruner.structure.kept import restrict
from llmpruner.structure.scope import Scope

ALL = (0, 1, 2, 3)


def scores_for(groups):
    generator = torch.Generator().manual_seed(0)
    return {g.name: torch.rand(g.units, generator=generator, dtype=torch.float64) for g in groups}


def choose(graph, kinds, demand, allocation=Uniform):
    scope = Scope(kinds, ALL)
    groups = scope.groups(graph)
    return select(graph, groups, scores_for(groups), scope, demand, allocation())


@pytest.mark.parametrize("allocation", [Uniform, GlobalRanking], ids=lambda cls: cls.name)
@pytest.mark.parametrize(
    "kinds",
    [("mlp",), ("mlp", "attention"), ("mlp", "query", "attention"), ("hidden",), ("layer", "mlp")],
    ids="+".join,
)
@pytest.mark.parametrize("ratio", [0.07, 0.2, 0.45])
def test_the_amount_is_hit_within_one_unit(gqa, kinds, ratio, allocation):
    graph = gqa.graph
    target = round(ratio * graph.decoder_parameters)
    kept = choose(graph, kinds, Demand(amount=target), allocation=allocation)
    removed = graph.decoder_parameters - restrict(graph, kept).decoder_parameters
    finest = min(graph.parameters_per_unit(g) for g in graph.of_kinds(kinds))
    assert abs(removed - target) <= finest


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


def measured(graph, kinds, demand, loss, allocation):
    scope = Scope(kinds, tuple(range(graph.num_layers)))
    groups = scope.groups(graph)
    scores = {g.name: torch.arange(g.units, dtype=torch.float64) for g in groups}
    return select(graph, groups, scores, scope, demand, allocation, loss=loss)


def lost(graph, kept):
    """Group → share of its units that were removed."""
    return {name: 1 - len(units) / graph.by_name[name].units for name, units in kept.items()}


def quadratic(graph, weights):
    return lambda kept: sum(weights[name] * share**2 for name, share in lost(graph, kept).items())


LOSSES = {f"layers.{layer}.mlp": loss for layer, loss in enumerate((1.0, 2.0, 4.0, 8.0))}


def test_shares_go_where_the_loss_rises_least(gqa):
    """For losses aᵢsᵢ² under Σsᵢ = S the best shares are sᵢ = S/(aᵢ Σ1/aⱼ), with a loss of S²/Σ1/aⱼ."""
    graph = gqa.graph
    demand = Demand(units=dict.fromkeys(LOSSES, 0.25 * 96))
    loss = quadratic(graph, LOSSES)
    kept = measured(graph, ("mlp",), demand, loss, Sensitivity())
    equal = 0.25**2 * sum(LOSSES.values())
    best = 1.0 / sum(1 / weight for weight in LOSSES.values())
    assert best <= loss(kept) + 1e-3 and loss(kept) < best + 0.35 * (equal - best)
    shares = [lost(graph, kept).get(name, 0.0) for name in LOSSES]
    assert shares == sorted(shares, reverse=True)


class OfAPlugin(Allocation):
    name = "of-a-plugin"

    def allocate(self, task):
        return top_up(task, {queue.group.name: 0 for queue in task.queues})


@pytest.mark.parametrize("allocation", (Sensitivity(), GlobalRanking(), OfAPlugin()), ids=lambda one: one.name)
@pytest.mark.parametrize("kinds", [("mlp",), ("mlp", "attention"), ("layer", "mlp")], ids="+".join)
def test_shares_of_units_remove_what_equal_shares_do(gqa, kinds, allocation):
    """A head or a layer was counted as one MLP channel, and channels of layers that go as removed ones: 0.3 of the
    units were up to all layers but one."""
    graph = gqa.graph
    groups = graph.of_kinds(kinds)
    weights = {g.name: 1.0 if g.layer is None else (5.0, 1.0, 2.0, 1.0)[g.layer] for g in groups}
    for share in (0.2, 0.25, 0.3):
        demand = Demand(units={g.name: share * g.units for g in groups})
        equal, found = (
            graph.decoder_parameters
            - restrict(graph, measured(graph, kinds, demand, quadratic(graph, weights), how)).decoder_parameters
            for how in (Uniform(), allocation)
        )
        assert 2 * abs(found - equal) <= min(graph.parameters_per_unit(g) for g in groups)


@pytest.mark.parametrize(("levels", "cuts"), [((), 4), ((0.5,), 8), ((0.1, 0.5, 0.9), 16)])
def test_each_group_is_measured_at_the_levels_and_in_full(gqa, levels, cuts):
    calls, loss, demand = [], quadratic(gqa.graph, LOSSES), Demand(units=dict.fromkeys(LOSSES, 24.0))
    measured(gqa.graph, ("mlp",), demand, lambda kept: calls.append(kept) or loss(kept), Sensitivity(levels=levels))
    assert len(calls) == cuts
    as_text = ", ".join(map(str, levels))
    assert Sensitivity(levels=as_text).settings.levels == levels, "from the command line"


IDS = torch.randint(128, (24, 16), generator=torch.Generator().manual_seed(3))


def trials(loaded, kind):
    return trial_loss(loaded.network, loaded.graph, loaded.family, CalibrationSet(IDS, "made up"), {})


@pytest.mark.parametrize("kind", ["mlp", "attention", "hidden", "layer"])
def test_a_trial_is_the_divergence_of_the_model_that_is_really_cut(gqa, kind):
    before = {name: p.detach().clone() for name, p in gqa.network.named_parameters()}
    loss = trials(gqa, kind)
    group = gqa.graph.of_kinds([kind])[0]
    kept = {group.name: tuple(range(group.units * 3 // 4))}
    pruned = copy.deepcopy(gqa.network)
    cut(pruned, gqa.graph, kept, gqa.family)
    tried = IDS[-12:]
    log_p, log_q = (logits(m, tried)[:, :-1].double().log_softmax(-1) for m in (gqa.network, pruned))
    expected = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()
    assert loss(kept) == pytest.approx(float(expected), rel=0.05) and expected > 1e-4
    assert loss({}) == pytest.approx(0.0, abs=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in gqa.network.named_parameters())


def test_a_divergence_that_is_not_finite_is_refused(gqa):
    loss = trials(gqa, "mlp")
    gqa.network.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ModelError, match=r"not a finite number; .* overflow in float32"):
        loss({"layers.1.mlp": range(48)})


def test_plans_repeat_and_record_the_allocation(gqa):
    by_norm = {"ratio": 0.2, "kinds": "mlp,attention", "importance": "l2"}
    one, other = (llmpruner.plan(gqa, **by_norm, allocation="sensitivity", samples=8, length=16) for _ in range(2))
    assert one == other and one.selection.allocation == "sensitivity"
    assert one.selection.settings == Sensitivity().record() != {}
    assert one.estimation.fingerprint is not None
    assert one.cuts != llmpruner.plan(gqa, **by_norm).cuts
