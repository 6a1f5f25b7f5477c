"""Units can be chosen during the compensation, layer by layer, and the choice is the same as estimation's."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from criteria_cases import make, tokens

from llmpruner.discovery.oracle import random_plan
from llmpruner.engine.execution import Execution
from llmpruner.pipeline import calibrate, make_plan, prune_model, select
from llmpruner.pruning.allocation import GlobalRanking
from llmpruner.pruning.choice import waiting_chooser
from llmpruner.pruning.compensation.base import RepairTask
from llmpruner.pruning.compensation.builtin import BiasShift, NoCompensation, Refit
from llmpruner.pruning.compensation.choose import Chooser, can_wait
from llmpruner.pruning.criteria.activation import Fluctuation, OutputEnergy, WandaSp
from llmpruner.pruning.criteria.estimate import estimate
from llmpruner.pruning.criteria.layers import BlockInfluence
from llmpruner.pruning.criteria.magnitude import L1
from llmpruner.pruning.criteria.obs import OptimalBrainSurgeon
from llmpruner.pruning.criteria.taylor import Taylor
from llmpruner.structure.scope import build_queue
from llmpruner.testing.models import cut_by, small_job

CALIBRATION = tokens(24, 32, seed=0)
JOB = small_job(OutputEnergy(), amount=0.3, layers="0-2", compensation=Refit(), seed=3)
JOB = replace(JOB, calibration=replace(JOB.calibration, samples=6, length=24))
WAITS = [
    *(("llama-gqa", kind) for kind in ("mlp", "attention", "query")),
    *((name, "mlp+attention") for name in ("llama-mha", "gpt2", "gemma2", "phi", "glm")),
    *((name, "mlp") for name in ("mixtral", "gpt_oss")),
]


def groups_of(loaded, kinds: str):
    return [group for group in loaded.graph.of_kinds(kinds.split("+")) if group.units > group.minimum]


def plan_for(loaded, kinds: str) -> dict[str, tuple[int, ...]]:
    planned = random_plan(groups_of(loaded, kinds), seed=1, uneven=False)
    return {name: tuple(units) for name, units in planned.items()}


def copied(loaded):
    return replace(loaded, model=copy.deepcopy(loaded.model))


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "criterion", [OutputEnergy(), WandaSp(), Fluctuation(), OptimalBrainSurgeon()], ids=lambda c: c.name
)
def test_criteria_of_inputs_can_wait(criterion):
    loaded = make("llama-gqa")
    assert can_wait(criterion, loaded.graph, groups_of(loaded, "mlp"))


@pytest.mark.parametrize("criterion", [L1(), Taylor(), BlockInfluence()], ids=lambda c: c.name)
def test_criteria_of_anything_else_cannot(criterion):
    loaded = make("llama-gqa")
    assert not can_wait(criterion, loaded.graph, groups_of(loaded, "mlp"))


@pytest.mark.parametrize("kinds", ["hidden", "layer", "mlp+hidden", "attention+query"])
def test_units_that_share_weights_with_others_or_are_in_all_layers_cannot(kinds):
    """Query heads are parts of KV heads, so that the same weights read both."""
    loaded = make("llama-gqa")
    assert not can_wait(OutputEnergy(), loaded.graph, groups_of(loaded, kinds))


@pytest.mark.parametrize(("name", "kinds"), WAITS)
def test_the_compensation_chooses_what_estimation_would(name, kinds):
    loaded = make(name)
    kept = plan_for(loaded, kinds)
    assert can_wait(OutputEnergy(), loaded.graph, groups_of(loaded, kinds))
    chooser = Chooser(OutputEnergy())
    found = Refit().repair(RepairTask(copied(loaded).model, loaded.graph, kept, CALIBRATION, chooser)).kept
    scores = estimate(loaded.model, loaded.graph, groups_of(loaded, kinds), OutputEnergy(), CALIBRATION).by_group
    for group in (loaded.graph.by_name[name] for name in kept):
        queue = build_queue(group, scores[group.name].tolist())
        assert found[group.name] == queue.kept_after(queue.steps_for(group.units - len(kept[group.name])))
        assert len(found[group.name]) == len(kept[group.name])
    assert found != kept
    assert chooser.choose_all(loaded.model, loaded.graph, kept, CALIBRATION) == found


@pytest.mark.parametrize("criterion", [OutputEnergy(), OptimalBrainSurgeon()], ids=lambda c: c.name)
@pytest.mark.parametrize("round_to", [1, 4])
def test_units_chosen_in_the_compensation_are_those_of_the_plan_which_replays_bit_for_bit(gqa, criterion, round_to):
    job = replace(JOB, criterion=criterion, round_to=round_to)
    before = copy.deepcopy(gqa.model)
    plan, _ = make_plan(gqa, job)
    assert same(gqa.model, before)
    chooser, execution = waiting_chooser(job, gqa), Execution(gqa.weights)
    preliminary, _, _ = select(gqa, job, calibrate(gqa, job, execution), chooser, execution)
    assert chooser is not None
    assert preliminary.cuts != plan.cuts, "without scores other units go, or this test shows nothing"
    at_once, replayed = prune_model(copied(gqa), job), cut_by(copied(gqa), plan)
    assert at_once.plans[-1] == plan
    assert same(at_once.model, replayed.model)
    assert all(len(cut.kept) % round_to == 0 for cut in plan.cuts.values())


def test_the_choice_reads_all_of_the_text(gqa):
    """The units of a plan are those that its whole calibration text ranks highest."""
    plan, _ = make_plan(gqa, JOB)
    text = calibrate(gqa, JOB, Execution(gqa.weights))
    groups = [gqa.graph.by_name[name] for name in plan.cuts]
    scores = estimate(gqa.model, gqa.graph, groups, OutputEnergy(), text).by_group
    for name, cut in plan.cuts.items():
        best = scores[name].topk(len(cut.kept)).indices.sort().values.tolist()
        assert list(cut.kept) == best


@pytest.mark.parametrize(
    "change",
    [
        {"compensation": NoCompensation()},
        {"compensation": BiasShift()},
        {"allocation": GlobalRanking()},
        {"steps": 2},
        {"kinds": ("hidden",)},
    ],
    ids=lambda change: "{}".format(*change),
)
def test_other_plans_are_final_before_the_compensation(gqa, change):
    assert waiting_chooser(replace(JOB, **change), gqa) is None
