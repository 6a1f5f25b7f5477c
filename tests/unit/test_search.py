"""Allocations that measure remove most where the loss rises least, and what they measure is the cut model itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

import llmpruner
from llmpruner import ModelError
from llmpruner.calibration.calibration import CalibrationSet
from llmpruner.errors import SelectionError, SettingsError
from llmpruner.models.surgery import cut
from llmpruner.progress import Progress
from llmpruner.pruning.allocation.base import Demand
from llmpruner.pruning.allocation.ranking import GlobalRanking
from llmpruner.pruning.allocation.search import Search
from llmpruner.pruning.allocation.select import select
from llmpruner.pruning.allocation.sensitivity import Sensitivity
from llmpruner.pruning.allocation.uniform import Uniform
from llmpruner.pruning.compensation.consumers import Consumer
from llmpruner.pruning.compensation.gram_fit import fitted
from llmpruner.pruning.compensation.trials import Trials
from llmpruner.pruning.criteria.estimate import Scores
from llmpruner.structure.kept import parameters_after
from llmpruner.structure.scope import Scope

MEASURED = (Sensitivity(), Search())
EACH = pytest.mark.parametrize("allocation", MEASURED, ids=lambda made: made.name)


def choose(graph, kinds, demand, loss, allocation):
    scope = Scope(kinds, tuple(range(graph.num_layers)))
    groups = scope.groups(graph)
    scores = Scores({g.name: torch.arange(g.units, dtype=torch.float64) for g in groups})
    return select(graph, groups, scores, scope, demand, allocation, loss=loss)


def lost(graph, kept):
    """Group → share of its units that were removed."""
    return {name: 1 - len(units) / graph.by_name[name].units for name, units in kept.items()}


def quadratic(graph, weights):
    return lambda kept: sum(weights[name] * share**2 for name, share in lost(graph, kept).items())


@EACH
@pytest.mark.parametrize("kinds", [("mlp",), ("mlp", "attention"), ("layer", "mlp"), ("hidden",)], ids="+".join)
def test_the_amount_is_hit_within_one_unit(gqa, kinds, allocation):
    graph = gqa.graph
    weights = {g.name: 1.0 + number for number, g in enumerate(graph.groups)}
    target = round(0.2 * graph.decoder_parameters)
    kept = choose(graph, kinds, Demand(amount=target), quadratic(graph, weights), allocation)
    removed = graph.decoder_parameters - parameters_after(graph, kept)[1]
    assert abs(removed - target) <= min(graph.parameters_per_unit(g) for g in graph.of_kinds(kinds))


@EACH
def test_shares_go_where_the_loss_rises_least(gqa, allocation):
    """For losses aᵢsᵢ² under Σsᵢ = S the best shares are sᵢ = S/(aᵢ Σ1/aⱼ), with a loss of S²/Σ1/aⱼ."""
    graph = gqa.graph
    weights = {f"layers.{layer}.mlp": weight for layer, weight in enumerate((1.0, 2.0, 4.0, 8.0))}
    demand = Demand(units=dict.fromkeys(weights, 0.25 * 96))
    loss = quadratic(graph, weights)
    kept = choose(graph, ("mlp",), demand, loss, allocation)
    equal = 0.25**2 * sum(weights.values())
    best = 1.0 / sum(1 / weight for weight in weights.values())
    assert best <= loss(kept) + 1e-3 and loss(kept) < best + 0.35 * (equal - best)
    shares = [lost(graph, kept).get(name, 0.0) for name in weights]
    assert shares == sorted(shares, reverse=True)


def test_search_sees_what_cuts_cost_in_combination(gqa):
    """Cutting layers 0 and 1 together costs most; alone, each costs less than the others."""
    graph = gqa.graph

    def loss(kept):
        share = lost(graph, kept)
        first, second, *others = (share.get(f"layers.{layer}.mlp", 0.0) for layer in range(4))
        return 0.5 * (first + second) + sum(others) + 20 * first * second

    demand = Demand(units={f"layers.{layer}.mlp": 24.0 for layer in range(4)})
    alone, together = (loss(choose(graph, ("mlp",), demand, loss, how)) for how in MEASURED)
    assert together < loss({f"layers.{layer}.mlp": range(72) for layer in range(4)}) < alone


def test_search_is_never_worse_than_equal_shares(gqa):
    graph = gqa.graph

    def loss(kept):
        return sum(abs(share - 0.25) for share in lost(graph, kept).values())

    demand = Demand(units={f"layers.{layer}.mlp": 24.0 for layer in range(4)})
    assert loss(choose(graph, ("mlp",), demand, loss, Search())) == 0.0


@pytest.mark.parametrize("allocation", (*MEASURED, GlobalRanking()), ids=lambda one: one.name)
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
            - parameters_after(graph, choose(graph, kinds, demand, quadratic(graph, weights), how))[1]
            for how in (Uniform(), allocation)
        )
        assert 2 * abs(found - equal) <= min(graph.parameters_per_unit(g) for g in groups)


@EACH
def test_without_a_loss_they_are_refused(gqa, allocation):
    with pytest.raises(SelectionError, match=f"allocation {allocation.name} measures the model on calibration text"):
        choose(gqa.graph, ("mlp",), Demand(amount=1000), None, allocation)


def counted(graph, allocation):
    """How many units each group keeps, the loss of that, and how many times ``allocation`` measured."""
    weights = {f"layers.{layer}.mlp": weight for layer, weight in enumerate((1.0, 2.0, 4.0, 8.0))}
    loss, calls = quadratic(graph, weights), []

    def measure(kept):
        calls.append(kept)
        return loss(kept)

    kept = choose(graph, ("mlp",), Demand(units=dict.fromkeys(weights, 24.0)), measure, allocation)
    return [len(kept.get(name, range(96))) for name in weights], loss(kept), len(calls)


def test_more_rounds_of_the_search_measure_more_and_end_nearer_to_the_best(gqa):
    (_, one, few), (_, three, many) = (counted(gqa.graph, Search(rounds=rounds)) for rounds in (1, 3))
    assert few < many and three < one


@pytest.mark.parametrize(("probe", "reach", "most"), [(0.05, 1, 5), (0.05, 4, 20), (0.1, 1, 10)])
def test_the_settings_of_the_search_limit_its_moves(gqa, probe, reach, most):
    kept, _, _ = counted(gqa.graph, Search(rounds=1, probe=probe, reach=reach))
    assert 0.6 * most <= max(abs(units - 72) for units in kept) <= most


def test_sensitivity_measures_each_group_at_the_levels_and_in_full(gqa):
    """Besides once without a cut. Settings come as text from the command line."""
    assert Sensitivity(levels="0.1, 0.5,0.9").settings.levels == (0.1, 0.5, 0.9)
    assert [counted(gqa.graph, Sensitivity(levels=levels))[2] for levels in ((), (0.5,), (0.1, 0.5, 0.9))] == [5, 9, 17]
    with pytest.raises(SettingsError, match=r"sensitivity: levels\.0 = 1\.5 is refused: expected a number below 1"):
        Sensitivity(levels=(1.5,))


def trials(loaded, kinds, *, refit, rows=24):
    ids = torch.randint(128, (rows, 16), generator=torch.Generator().manual_seed(3))
    groups = loaded.graph.of_kinds(kinds)
    calibration = CalibrationSet(ids, "made up")
    made = Trials(loaded.model, loaded.graph, groups, loaded.family, calibration, refit=refit, progress=Progress())
    return made, ids


@pytest.mark.parametrize("kind", ["mlp", "attention", "hidden", "layer"])
def test_a_trial_is_the_divergence_of_the_model_that_is_really_cut(gqa, kind):
    before = {name: p.detach().clone() for name, p in gqa.model.named_parameters()}
    made, ids = trials(gqa, (kind,), refit=False)
    group = gqa.graph.of_kinds([kind])[0]
    kept = {group.name: tuple(range(group.units * 3 // 4))}
    pruned = copy.deepcopy(gqa.model)
    cut(pruned, gqa.graph, kept, gqa.family)
    tried = torch.cat(made.tried)
    assert torch.equal(tried, ids[-len(tried) :]) and 0 < len(tried) < len(ids)
    with torch.no_grad():
        log_p, log_q = (m(tried).logits[:, :-1].double().log_softmax(-1) for m in (gqa.model, pruned))
    expected = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()
    assert made.loss(kept) == pytest.approx(float(expected), rel=0.05) and expected > 1e-4
    assert made.loss({}) == pytest.approx(0.0, abs=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in gqa.model.named_parameters())


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_a_unit_with_a_copy_costs_nothing_once_weights_are_fitted(gqa, kind):
    """Two equal units: new weights of the one that is kept replace both."""
    group = gqa.graph.of_kinds([kind])[0]
    last = group.units - 1
    with torch.no_grad():
        for span in group.spans:
            weight = gqa.model.get_parameter(span.parameter)
            source = weight.index_select(span.axis, torch.tensor(span.indices([0])))
            weight.index_copy_(span.axis, torch.tensor(span.indices([last])), source)
    kept = {group.name: tuple(range(last))}
    plain, fitted = (trials(gqa, (kind,), refit=refit, rows=200)[0].loss(kept) for refit in (False, True))
    assert plain > 1e-3 and fitted < 0.02 * plain


def test_an_expert_without_tokens_keeps_its_weights():
    """Its Gram matrix is zero, so that nothing is known about its inputs."""
    weight = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    gram = torch.stack([inputs.T @ inputs, torch.zeros(8, 8), inputs.T @ inputs * 1e-30])
    kept = torch.tensor([0, 1, 4, 5, 7])
    new = fitted(weight, Consumer("experts", 2, kept, False, (3, 5, 8)), gram)
    torch.testing.assert_close(new[1][:, kept], weight[1][:, kept])
    assert not torch.allclose(new[0][:, kept], weight[0][:, kept], atol=0.1)
    assert torch.isfinite(new).all() and not new[:, :, [2, 3, 6]].any()


def test_a_divergence_that_is_not_finite_is_refused(gqa):
    made, _ = trials(gqa, ("mlp",), refit=False)
    with torch.no_grad():
        gqa.model.lm_head.weight[5] = float("nan")
    with pytest.raises(ModelError, match=r"not a finite number; .* overflow in float32"):
        made.loss({"layers.1.mlp": range(48)})


def test_one_sample_is_too_little_to_fit_and_to_measure(gqa):
    options = {"ratio": 0.2, "method": "best", "calibration": "self", "samples": 1, "length": 16, "shape": "free"}
    with pytest.raises(SettingsError, match=r"--samples 1 leaves none; give 2 or more, or --compensate none"):
        llmpruner.plan(gqa, allocation="search", **options)
    for possible in ({"allocation": "search", "compensate": "none"}, {"allocation": "uniform"}):
        llmpruner.plan(gqa, **{**options, **possible})


@EACH
def test_plans_repeat_and_record_the_allocation(gqa, allocation):
    by_norm = {"ratio": 0.2, "kinds": "mlp,attention", "importance": "l2"}
    one, other = (llmpruner.plan(gqa, **by_norm, allocation=allocation.name, samples=8, length=16) for _ in range(2))
    assert one == other and one.selection.allocation == allocation.name
    assert one.selection.settings == allocation.record() != {}
    assert one.estimation.fingerprint is not None
    assert one.cuts != llmpruner.plan(gqa, **by_norm).cuts
