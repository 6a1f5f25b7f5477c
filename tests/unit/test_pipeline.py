"""The stages together: plans that are reproducible, replayable, and mean the same in one step and in several."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from llmpruner import PlanError, SelectionError
from llmpruner.importance.activation import OutputEnergy
from llmpruner.importance.estimate import estimate
from llmpruner.importance.magnitude import L1
from llmpruner.importance.taylor import Taylor
from llmpruner.recipes.pipeline import PruneSettings, apply_plan, default_layers, draft_plan, make_plan, save
from llmpruner.structure.plan import PruningPlan, Target

RATIO = Target(by="ratio", amount=0.3)


def test_the_same_seed_gives_the_same_bytes(loaded):
    settings = PruneSettings(target=RATIO, kinds=("mlp", "attention"), samples=3, length=16, seed=7)
    first = make_plan(loaded, Taylor(), settings).to_json()
    assert make_plan(loaded, Taylor(), settings).to_json() == first
    assert make_plan(loaded, Taylor(), replace(settings, seed=8)).to_json() != first


def test_a_plan_survives_its_file(gqa, tmp_path):
    made = make_plan(gqa, L1(), PruneSettings(target=RATIO))
    made.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == made
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_for_another_model_is_refused(gqa, loaded):
    made = make_plan(gqa, L1(), PruneSettings(target=RATIO))
    if loaded.graph.shapes == gqa.graph.shapes:
        made.check(loaded.graph)
        return
    before = copy.deepcopy(loaded.model.state_dict())
    with pytest.raises(PlanError, match=r"this plan was made for 'tiny' .* make a new plan"):
        apply_plan(loaded, made)
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unknown": 1}, "unknown: Extra inputs"),
        ({"seed": "x"}, "seed: Input should be a valid integer"),
    ],
)
def test_a_malformed_plan_says_where(gqa, tmp_path, change, message):
    values = json.loads(make_plan(gqa, L1(), PruneSettings(target=RATIO)).to_json())
    (tmp_path / "plan.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(PlanError, match=f"is not a pruning plan: {message}"):
        PruningPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("version", [1, 3])
def test_a_plan_of_another_version_asks_for_a_new_one(gqa, version):
    values = json.loads(make_plan(gqa, L1(), PruneSettings(target=RATIO)).to_json())
    old = {**values, "schema_version": version, "gone": 1}
    with pytest.raises(PlanError, match=f"^p is a plan of version {version}, and this .* reads version 2; make a new"):
        PruningPlan.parse(json.dumps(old), "p")


def test_a_plan_records_the_settings_that_it_replays_with(gqa):
    settings = PruneSettings(target=RATIO, samples=3, length=16, compensate="refit")
    values = json.loads(make_plan(gqa, Taylor(), settings).to_json())
    assert values["estimation"]["settings"] == {"variant": "element1"}
    assert values["selection"]["allocation"] == "uniform"
    written = {"self": {"passage": 64, "batch": 128}}
    assert values["estimation"]["sources"] == values["compensation"]["sources"] == written
    recorded = {name: values["compensation"][name] for name in ("name", "settings", "calibration", "samples", "length")}
    assert recorded == {"name": "refit", "settings": {"mix": 0.5}, "calibration": "self", "samples": 3, "length": 16}


@pytest.mark.parametrize("kinds", [("mlp",), ("layer",), ("mlp", "attention", "layer", "hidden")], ids="+".join)
def test_several_steps_reach_the_same_amount_and_replay(gqa, kinds):
    settings = PruneSettings(target=RATIO, kinds=kinds, layers=(0, 1, 2, 3), steps=3, samples=2, length=12)
    original = copy.deepcopy(gqa.model.state_dict())
    made = make_plan(gqa, Taylor(), settings)
    assert all(torch.equal(original[name], tensor) for name, tensor in gqa.model.state_dict().items())
    pruned = apply_plan(gqa, made)
    removed = 1 - pruned.graph.decoder_parameters / 123392
    unit = 0.25 if kinds == ("layer",) else 0.02
    assert abs(removed - 0.3) < unit
    ids = torch.arange(8)[None]
    assert torch.isfinite(pruned.model(ids).logits).all()


def test_steps_measure_again(gqa):
    base = PruneSettings(
        target=Target(by="ratio", amount=0.4), kinds=("mlp",), layers=(0, 1, 2, 3), samples=2, length=12
    )
    assert make_plan(gqa, Taylor(), base).cuts != make_plan(gqa, Taylor(), replace(base, steps=4)).cuts


def test_less_than_one_unit_is_refused(gqa):
    with pytest.raises(SelectionError, match="less than one unit"):
        make_plan(gqa, L1(), PruneSettings(target=Target(by="ratio", amount=1e-5)))


def test_total_parameters(gqa):
    total = gqa.graph.total_parameters
    with pytest.raises(SelectionError, match="is not below the model's"):
        make_plan(gqa, L1(), PruneSettings(target=Target(by="parameters", amount=total * 2)))
    made = make_plan(gqa, L1(), PruneSettings(target=Target(by="parameters", amount=total * 0.8)))
    unit = gqa.graph.parameters_per_unit(gqa.graph.by_name["layers.0.mlp"])
    assert abs(apply_plan(gqa, made).graph.total_parameters - total * 0.8) <= unit


def test_a_share_of_units_is_the_papers_amount(gqa):
    settings = PruneSettings(target=Target(by="units", amount=0.25), kinds=("mlp", "attention"), layers=(1, 2))
    cuts = make_plan(gqa, L1(), settings).cuts
    assert {(c.kind, len(c.kept)) for c in cuts.values()} == {("mlp", 72), ("attention", 3)}
    assert {c.layer for c in cuts.values()} == {1, 2}


def test_both_ends_are_protected(gqa):
    wide = replace(gqa, graph=replace(gqa.graph, groups=(), shapes={f"model.layers.{n}.w": (1,) for n in range(30)}))
    assert default_layers(wide) == tuple(range(3, 27))


def test_a_saved_model_can_be_pruned_again(gqa, tmp_path, catalog):
    from llmpruner.loading.model import load_model

    once = apply_plan(gqa, make_plan(gqa, L1(), PruneSettings(target=RATIO, kinds=("mlp",))))
    save(once, tmp_path / "once")
    loaded = load_model(str(tmp_path / "once"), catalog)
    assert loaded.graph == once.graph
    settings = PruneSettings(target=RATIO, kinds=("layer", "attention"), layers=(0, 1, 2, 3))
    twice = apply_plan(loaded, make_plan(loaded, L1(), settings))
    save(twice, tmp_path / "twice")
    again = load_model(str(tmp_path / "twice"), catalog)
    assert len(again.plans) == 2
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, twice.model(ids).logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("criterion", "compensate", "kinds", "tokens"),
    [
        (OutputEnergy(), "refit", ("mlp", "hidden"), 96),
        (OutputEnergy(), "refit", ("mlp",), 32),
        (Taylor(), "refit", ("mlp",), 32),
        (Taylor(), "none", ("mlp",), 96),
    ],
    ids=["inputs", "inputs that the repair sees again", "gradients", "no repair"],
)
def test_scores_that_have_the_last_word_see_the_text_of_the_repair(
    gqa, monkeypatch, criterion, compensate, kinds, tokens
):
    """Gradients cost more, and have to do with less."""
    monkeypatch.setattr("llmpruner.recipes.pipeline._FEWER_TOKENS", 32)
    seen = []

    def spy(*arguments, **options):
        seen.append(arguments[4].input_ids.numel())
        return estimate(*arguments, **options)

    monkeypatch.setattr("llmpruner.recipes.pipeline.estimate", spy)
    settings = PruneSettings(target=RATIO, kinds=kinds, samples=6, length=16, compensate=compensate)
    draft_plan(gqa, criterion, settings)
    assert seen == [tokens]
