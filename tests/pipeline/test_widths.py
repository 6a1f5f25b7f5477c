"""Uniform widths: equal groups of all layers keep the same, aligned number of units."""

import pytest
import torch
from criteria_cases import opened
from llmpruner_llama import LlamaFamily
from transformers import LlamaConfig, MixtralConfig

from llmpruner.discovery.tiny import random_instance
from llmpruner.pruning.allocation import GlobalRanking, Sensitivity, Uniform
from llmpruner.pruning.budgets import Cost
from llmpruner.pruning.selection import Demand, select
from llmpruner.structure.kept import restrict
from llmpruner.structure.scope import Scope, Widths
from llmpruner.testing.models import cut_by, make_plan, small_job

UNIFORM = Widths(uniform=True, round_to=8)


def chosen(loaded, kinds, ratio, allocation=Uniform, loss=None):
    """Kept units by random scores that grow with the layer, so that free widths would differ; and the removed share."""
    graph = loaded.graph
    scope = Scope(kinds, tuple(range(graph.num_layers)))
    groups = scope.groups(graph)
    generator = torch.Generator().manual_seed(0)
    scores = {
        g.name: (1 + (g.layer or 0)) * torch.rand(g.units, generator=generator, dtype=torch.float64) for g in groups
    }
    demand = Demand(amount=round(ratio * graph.decoder_parameters))
    kept = select(graph, groups, scores, scope, demand, allocation(), widths=UNIFORM, loss=loss)
    return kept, 1 - restrict(graph, kept).decoder_parameters / graph.decoder_parameters


@pytest.mark.parametrize("allocation", [Uniform, GlobalRanking], ids=lambda cls: cls.name)
@pytest.mark.parametrize("kinds", [("mlp",), ("mlp", "attention"), ("mlp", "layer")], ids="+".join)
def test_all_layers_keep_the_same_aligned_number_of_units(loaded, kinds, allocation):
    kept, removed = chosen(loaded, kinds, 0.3, allocation)
    graph = loaded.graph
    assert abs(removed - 0.3) < 0.13
    for kind in set(kinds) - {"layer"}:
        widths = {}
        for g in graph.of_kinds([kind]):
            widths.setdefault((g.in_layer(0), g.units), set()).add(len(kept.get(g.name, range(g.units))))
        gone = set(range(graph.num_layers)) - set(kept.get("layers", range(graph.num_layers)))
        assert gone or all(len(found) == 1 for found in widths.values()), widths
    assert all(len(units) % 8 == 0 for name, units in kept.items() if graph.by_name[name].kind == "mlp")


def test_an_allocation_that_measures_cuts_all_layers_of_a_kind_together(gqa):
    seen = []

    def loss(kept):
        seen.append({gqa.graph.by_name[name].kind: len(units) for name, units in kept.items()})
        assert all(len({len(units) for name, units in kept.items() if f".{kind}" in name}) <= 1 for kind in seen[-1])
        return float(sum(1 for kind in seen[-1] if kind == "attention"))

    kept, _ = chosen(gqa, ("mlp", "attention"), 0.2, Sensitivity, loss=loss)
    assert {"mlp"} == {gqa.graph.by_name[name].kind for name in kept}, "heads cost more here"
    assert len(kept) == gqa.graph.num_layers
    assert any(found.keys() == {"attention"} for found in seen)


@pytest.mark.parametrize("allocation", [Uniform, GlobalRanking, Sensitivity], ids=lambda cls: cls.name)
def test_a_share_of_units_counts_every_group_that_is_cut(gqa, allocation):
    """One queue stands for the channels of four layers, another for the hidden channels alone."""
    graph = gqa.graph
    scope = Scope(("mlp", "hidden"), tuple(range(graph.num_layers)))
    groups = scope.groups(graph)
    scores = {g.name: torch.arange(g.units, dtype=torch.float64) + (50 if g.kind == "mlp" else 0) for g in groups}
    demand = Demand(units={g.name: 0.25 * g.units for g in groups})

    def loss(kept):
        return sum(1 - len(units) / 96 for name, units in kept.items() if graph.by_name[name].kind == "mlp")

    kept = select(graph, groups, scores, scope, demand, allocation(), widths=UNIFORM, loss=loss)
    removed = sum(graph.by_name[name].units - len(units) for name, units in kept.items())
    assert 0 <= sum(demand.units.values()) - removed < 4 * 8


class FirstLayers(Cost):
    """Counts the channels of the first two layers alone, as a budget does whose layers differ."""

    label = "channels of the first layers"

    def remaining(self, kept=None, gone=()):
        return sum((kept or {}).get(f"layers.{layer}.mlp", 96) for layer in (0, 1))


@pytest.mark.parametrize("allocation", [Uniform, GlobalRanking], ids=lambda cls: cls.name)
def test_layers_that_save_nothing_keep_as_many_units_as_the_others(gqa, allocation):
    graph = gqa.graph
    groups = graph.of_kinds(["mlp"])
    scores = {g.name: torch.arange(g.units, dtype=torch.float64) for g in groups}
    scope = Scope(("mlp",), tuple(range(graph.num_layers)))
    wanted = {"demand": Demand(amount=48), "allocation": allocation(), "cost": FirstLayers()}
    kept = select(graph, groups, scores, scope, **wanted, widths=UNIFORM)
    assert {name: len(units) for name, units in kept.items()} == {g.name: 72 for g in groups}
    free = select(graph, groups, scores, scope, **wanted)
    assert set(free) == {"layers.0.mlp", "layers.1.mlp"}


@pytest.mark.parametrize("steps", [2, 4])
def test_widths_are_multiples_of_the_same_number_in_every_step(steps):
    """Of 1,024 channels, whose alignment is 64, and 512 MLP channels, for which it is still 64."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        head_dim=8, vocab_size=64,
    )  # fmt: skip
    loaded = opened(random_instance(config), LlamaFamily())
    plan = make_plan(loaded, small_job(shape="uniform", amount=0.31, steps=steps, kinds=("mlp",)))
    assert {len(cut.kept) for cut in plan.cuts.values()} == {320}
    # A second prune of the result.
    again = make_plan(cut_by(loaded, plan), small_job(shape="uniform", amount=0.1, kinds=("mlp",)))
    assert {(cut.units, len(cut.kept)) for cut in again.cuts.values()} == {(320, 256)}


def test_the_number_of_experts_is_a_multiple_of_the_same_in_every_step():
    config = MixtralConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
        vocab_size=64, num_local_experts=16, num_experts_per_tok=2,
    )  # fmt: skip
    loaded = opened(random_instance(config))
    for amount, steps in ((0.3, 2), (0.55, 2), (0.55, 3)):
        plan = make_plan(loaded, small_job(shape="uniform", amount=amount, steps=steps, kinds=("expert",)))
        assert {len(cut.kept) % 4 for cut in plan.cuts.values()} == {0}, (amount, steps, plan.kept)
