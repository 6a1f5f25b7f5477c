"""A budget counts what the model that is really cut costs, and every allocation meets it within one step."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from criteria_cases import opened
from transformers import AutoConfig, DynamicCache

import llmpruner
from llmpruner import PruningPlan, UnsupportedModelError
from llmpruner.discovery.cut import cut
from llmpruner.discovery.oracle import random_plan
from llmpruner.discovery.tiny import random_instance, small_config
from llmpruner.errors import SelectionError
from llmpruner.models.meta import macs_per_token
from llmpruner.models.model import Model
from llmpruner.plugins.builtin import llmpruner_budgets
from llmpruner.pruning import budgets
from llmpruner.pruning.allocation import GlobalRanking, Uniform
from llmpruner.pruning.budgets import BudgetSubject, counts
from llmpruner.pruning.saving import outcome_of
from llmpruner.pruning.selection import Demand, select
from llmpruner.structure.plan import Target
from llmpruner.structure.scope import Scope
from llmpruner.testing.models import cut_by, make_plan, small_job

ALL = (0, 1, 2, 3)
CONTEXT = 24
BUDGETS = {cls.name: cls for cls in llmpruner_budgets()}
KINDS = [("mlp",), ("attention",), ("mlp", "attention", "layer"), ("hidden",)]
HEADS = ("attention", "query", "layer")
INSIDE = ("mlp", "expert", "latent", *HEADS)
FALCON_40B = {"new_decoder_architecture": True, "hidden_size": 4096, "num_attention_heads": 64, "num_kv_heads": 8}


def bytes_of_a_cached_token(model) -> int:
    def cached(tokens: int) -> int:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.arange(1, 1 + tokens)[None], use_cache=True, cache=cache)
        return sum(
            value.numel() * value.element_size()
            for layer in cache.layers
            for value in vars(layer).values()
            if isinstance(value, torch.Tensor)
        )

    return cached(5) - cached(4)


def real(budget: str, model, graph) -> int:
    """The cost of the model itself, counted by other means than `Cost`."""
    own = dict(model.named_parameters())
    return {
        "decoder": lambda: sum(p.numel() for n, p in own.items() if n.startswith(graph.layers + ".")),
        "parameters": lambda: sum(p.numel() for p in own.values()),
        "bytes": lambda: sum(p.numel() * p.element_size() for p in own.values()),
        "macs": lambda: macs_per_token(model, graph, context=CONTEXT),
        "kv-cache": lambda: bytes_of_a_cached_token(model),
    }[budget]()


def settings_of(budget: str) -> dict[str, int]:
    return {"context": CONTEXT} if budget == "macs" else {}


def subject(loaded, groups=None):
    return BudgetSubject(loaded.network, loaded.graph, groups or loaded.graph.groups, loaded.family)


def cost_for(loaded, budget, groups=None):
    return BUDGETS[budget](**settings_of(budget)).cost(subject(loaded, groups))


def check_counts(loaded: Model, kinds: tuple[str, ...] = ()) -> None:
    """Costs before and after uneven cuts of everything at once, or of ``kinds``, a whole layer included, are those of
    the models."""
    graph, family = loaded.graph, loaded.family
    groups = [g for g in graph.groups if not kinds or g.kind in kinds]
    costs = {budget: cost_for(loaded, budget, groups) for budget in BUDGETS}
    for budget, cost in costs.items():
        assert cost.remaining() == real(budget, loaded.network, graph), budget
    inner = [g for g in groups if g.spans and g.units > g.minimum]
    for seed in range(2):
        kept = random_plan(inner, seed, uneven=True)
        if seed and "layers" in graph.by_name:
            kept["layers"] = [n for n in range(graph.num_layers) if n != 1]
        model = copy.deepcopy(loaded.network)
        left = cut(model, graph, kept, family)
        for budget, cost in costs.items():
            assert cost.remaining(*counts(graph, kept)) == real(budget, model, left), (budget, kept)


def test_costs_are_those_of_the_cut_model(loaded):
    check_counts(loaded)


@pytest.mark.parametrize(("model_type", "options", "kinds"), [
    ("gpt2", {}, ()),  # transposed weights, tied
    ("phi3", {"num_key_value_heads": 8}, INSIDE),  # query, key and value heads in one matrix
    pytest.param("falcon", FALCON_40B, HEADS, marks=pytest.mark.slow),  # the same, block by block
    pytest.param("gemma3_text", {}, HEADS, marks=pytest.mark.slow),  # sliding windows, norms over heads
    # Experts; caches a latent and one shared key, not its heads.
    pytest.param("deepseek_v3", {}, INSIDE, marks=pytest.mark.slow),
])  # fmt: skip
def test_costs_of_other_architectures(model_type, options, kinds):
    config = small_config(AutoConfig.for_model(model_type, **options))
    check_counts(opened(random_instance(config)), kinds)


def test_bytes_follow_the_type_of_every_parameter(gqa):
    gqa.network.to(torch.bfloat16)
    gqa.network.model.norm.float()
    gqa.network.model.layers[1].mlp.float()
    cost = cost_for(gqa, "bytes")
    kept = {"layers.1.mlp": range(50), "layers.2.mlp": range(30), "hidden": range(40)}
    left = cut(gqa.network, gqa.graph, kept, gqa.family)
    assert cost.remaining(*counts(gqa.graph, kept)) == real("bytes", gqa.network, left)


RANKING = GlobalRanking(normalize="parameters")


@pytest.mark.parametrize(
    ("kinds", "allocation", "steps"),
    [*((kinds, Uniform(), 1) for kinds in KINDS), (KINDS[2], Uniform(), 3), (KINDS[2], RANKING, 3)],
    ids=[*map("+".join, KINDS), "uniform in 3", "global in 3"],
)
@pytest.mark.parametrize("budget", sorted(BUDGETS.keys() - {"bytes"}))  # four for each parameter
def test_every_budget_is_met_within_one_step(gqa, budget, kinds, allocation, steps):
    graph = gqa.graph
    little = kinds == ("attention",) and budget in ("decoder", "parameters")
    job = small_job(
        amount=0.1 if little else 0.3, budget=BUDGETS[budget](**settings_of(budget)), kinds=kinds,
        allocation=allocation, steps=steps,
    )  # fmt: skip
    if budget == "kv-cache" and not {"attention", "layer"} & set(kinds):
        with pytest.raises(SelectionError, match=rf"{kinds[0]} units save nothing of the KV-cache bytes per token"):
            make_plan(gqa, job)
        return
    groups = graph.of_kinds(kinds)
    cost = cost_for(gqa, budget, groups)
    made = make_plan(gqa, job)
    left = counts(graph, made.kept)
    dense, after = cost.remaining(), cost.remaining(*left)
    told = outcome_of(gqa, made, job.budget, None).budget
    assert told is None or (told.before, told.after) == (dense, after)
    pruned = cut_by(gqa, made)
    assert after == real(budget, pruned.network, pruned.graph)
    goal = dense * (1 - job.amount)
    step = min(saved for group in groups if (saved := most_saved(cost, group)))
    assert abs(after - round(goal)) <= step


def most_saved(cost, group) -> float:
    """By one unit; of units that are no layers, in the mean."""
    if group.kind == "layer":
        return max(cost.remaining() - cost.remaining(gone=(unit,)) for unit in range(group.units))
    least = max(group.minimum, group.blocks)
    return (cost.remaining() - cost.remaining({group.name: least})) / max(group.units - least, 1)


def test_what_saves_nothing_stays_whole(gqa):
    made = llmpruner.plan(gqa, ratio=0.25, budget="kv-cache", kinds="mlp,attention", importance="l1")
    assert {(c.kind, len(c.kept)) for c in made.cuts.values()} == {("attention", 3)}


def test_layers_that_save_nothing_stay(gqa):
    graph = gqa.graph
    cost = cost_for(gqa, "kv-cache")
    cost = replace(cost, layers=[0, *cost.layers[1:]])  # a layer without a cache
    scope = Scope(("layer",), ALL)
    scores = {"layers": torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)}
    groups = scope.groups(graph)
    kept = select(graph, groups, scores, scope, Demand(amount=cost.remaining() // 3), Uniform(), cost=cost)
    assert kept == {"layers": (0, 2, 3)}


def test_a_cache_that_cannot_be_known_is_no_budget(gqa, monkeypatch):
    def measure():
        return budgets.KvCache().cost(subject(gqa))

    with monkeypatch.context() as patch:
        patch.setattr(DynamicCache, "update", lambda self, keys, values, *_a, **_k: (keys, values))
        with pytest.raises(UnsupportedModelError, match="does not grow with the tokens"):
            measure()

    class Compressed(type(DynamicCache(config=gqa.network.config).layers[0])):
        pass

    class Other(DynamicCache):
        def __init__(self, config):
            super().__init__(config=config)
            self.layers = [Compressed() for _ in self.layers]

    with monkeypatch.context() as patch:
        patch.setattr("llmpruner.models.generation.DynamicCache", Other)
        with pytest.raises(UnsupportedModelError, match="is a Compressed, which may not grow with every token"):
            measure()
    # No layer caches less than three heads, whatever is left of it.
    honest = budgets.bytes_per_token
    monkeypatch.setattr(budgets, "bytes_per_token", lambda *a: [max(size, 3 * 64) for size in honest(*a)])
    with pytest.raises(UnsupportedModelError, match="is not proportional to the units that are kept"):
        measure()


def test_a_target_records_what_applies_to_it(gqa):
    assert Target(by="ratio", amount=0.3).model_dump() == {"by": "ratio", "amount": 0.3, "budget": "decoder"}
    assert Target(by="units", amount=0.3).model_dump() == {"by": "units", "amount": 0.3}
    target = Target(by="ratio", amount=0.3, budget="macs", settings={"context": CONTEXT})
    made = llmpruner.plan(gqa, ratio=0.3, budget="macs", importance="l1", settings={"macs": {"context": CONTEXT}})
    assert PruningPlan.model_validate_json(made.to_json()).target == target
    assert json.loads(made.to_json())["target"]["settings"] == {"context": CONTEXT}
    counted = [Target(by=by, amount=1, budget="macs").counted_in for by in ("ratio", "parameters", "units")]
    assert counted == ["macs", "parameters", "decoder"]
