"""The stages together: plans that are reproducible, replayable, and mean the same in one step and in several."""

import copy
import json

import criteria_cases
import pytest
import tiny_models
import torch
from llmpruner_llama import LlamaFamily

import llmpruner
from llmpruner import ModelError, OutputError
from llmpruner.discovery.cut import cut
from llmpruner.discovery.oracle import logits
from llmpruner.errors import SelectionError
from llmpruner.pruning.compensation.compensations import Refit
from llmpruner.pruning.criteria.estimate import estimate
from llmpruner.structure.kept import restrict
from llmpruner.testing.models import make_plan, small_job

LITTLE_TEXT = {"samples": 2, "length": 12}


def stopped(*_):
    raise KeyboardInterrupt


def test_a_plan_records_the_settings_that_it_replays_with(gqa, tmp_path):
    made = llmpruner.plan(gqa, ratio=0.3, importance="taylor", samples=3, length=16, compensate="refit")
    values = json.loads(made.to_json())
    assert values["estimation"]["settings"] == {"variant": "element1"}
    assert values["selection"]["allocation"] == "uniform"
    written = {"self": {"passage": 64}}
    assert values["estimation"]["sources"] == values["compensation"]["sources"] == written
    text = {"calibration": "self", "samples": 3, "length": 16}
    assert values["compensation"].items() >= {"name": "refit", "settings": Refit().record(), **text}.items()
    made.save(f"{tmp_path}/plan.json")
    assert llmpruner.PruningPlan.load(f"{tmp_path}/plan.json").to_json() == made.to_json()


@pytest.mark.parametrize("kinds", [("mlp",), ("layer",), ("mlp", "attention", "layer", "hidden")], ids="+".join)
def test_several_steps_reach_the_same_amount_and_replay(gqa, kinds):
    original = copy.deepcopy(gqa.network.state_dict())
    made = llmpruner.plan(gqa, ratio=0.3, kinds=kinds, importance="taylor", steps=3, **LITTLE_TEXT)
    assert all(torch.equal(original[name], tensor) for name, tensor in gqa.network.state_dict().items())
    at_once = llmpruner.plan(gqa, ratio=0.3, kinds=kinds, importance="taylor", **LITTLE_TEXT)
    assert made.selection.steps == 3 and (kinds == ("layer",) or made.cuts != at_once.cuts), "each step measures again"
    pruned = llmpruner.prune(gqa, plan=made)
    removed = 1 - pruned.graph.decoder_parameters / 123392
    unit = 0.25 if kinds == ("layer",) else 0.02
    assert abs(removed - 0.3) < unit
    ids = torch.arange(8)[None]
    assert torch.isfinite(pruned.network(ids).logits).all()


@pytest.mark.parametrize("shape", ["free", "uniform"])
def test_query_heads_go_in_steps_with_their_kv_heads(shape, monkeypatch):
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 4}
    monkeypatch.setitem(criteria_cases.CASES, "many heads", ("llama", criteria_cases.SMALL | heads))
    loaded = criteria_cases.make("many heads")
    options = {"kinds": "attention,query", "importance": "l1", "compensate": "none", "layers": "all", "shape": shape}
    made = llmpruner.plan(loaded, ratio=0.3, steps=3, **options)
    made.check(loaded.graph)
    whole = loaded.graph.decoder_parameters
    removed = 1 - llmpruner.prune(loaded, plan=made).graph.decoder_parameters / whole
    assert abs(removed - 0.3) < 0.05


def test_less_than_a_unit_is_refused_by_the_stages_too(gqa):
    """For budgets and allocations whose demand is known only while they run."""
    with pytest.raises(SelectionError, match="less than one unit of the selected groups; ask for more"):
        make_plan(gqa, small_job(amount=1e-5))


def test_both_ends_are_protected(deep):
    options = {"ratio": 0.2, "importance": "l2", "compensate": "none"}
    assert llmpruner.plan(deep, shape="free", **options).selection.layers == tuple(range(1, 7))
    assert llmpruner.plan(deep, **options).selection.layers == tuple(range(8))


def test_a_saved_model_can_be_pruned_again(gqa, tmp_path):
    once = llmpruner.prune(gqa, ratio=0.3, importance="l1", output=tmp_path / "once")
    assert once is gqa and len(gqa.plans) == 1 and gqa.outcome is not None and gqa.form is not None
    loaded = llmpruner.load(tmp_path / "once")
    assert loaded.graph == once.graph
    twice = llmpruner.prune(loaded, ratio=0.3, kinds="layer,attention", importance="l1", output=tmp_path / "twice")
    again = llmpruner.load(tmp_path / "twice")
    assert len(again.plans) == 2 and again.record["work"][:1] == loaded.record["work"] and again.record["work"][1]
    ids = torch.arange(8)[None]
    torch.testing.assert_close(logits(again.network, ids), logits(twice.network, ids), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("criterion", "compensate", "tokens"), [("energy", "refit", 96), ("taylor", "refit", 32), ("taylor", "none", 96)]
)
def test_gradients_read_less_text_where_a_compensation_follows(gqa, monkeypatch, criterion, compensate, tokens):
    monkeypatch.setattr("llmpruner.pruning.selection.GRADIENT_TOKENS", 32)
    seen = []
    monkeypatch.setattr("llmpruner.pruning.selection.estimate", lambda *a, **o: seen.append(a[4]) or estimate(*a, **o))
    llmpruner.plan(gqa, ratio=0.3, importance=criterion, samples=6, length=16, compensate=compensate)
    assert [text.input_ids.numel() for text in seen] == [tokens]


def test_a_model_that_a_prune_left_half_changed_is_refused(gqa, tmp_path, monkeypatch):
    with pytest.raises(SelectionError):
        llmpruner.prune(gqa, ratio=1e-5, shape="free", importance="l1")
    assert llmpruner.plan(gqa, ratio=0.2, importance="l1")  # nothing was changed
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("llmpruner.models.surgery.restrict", stopped)
        llmpruner.prune(gqa, ratio=0.2, importance="l1", compensate="none")
    uses = (
        lambda: llmpruner.prune(gqa, ratio=0.2, importance="l1"),
        lambda: llmpruner.plan(gqa, ratio=0.2, importance="l1"),
        lambda: llmpruner.evaluate(gqa),
        lambda: llmpruner.generate(gqa, "x"),
        lambda: llmpruner.save(gqa, tmp_path / "out"),
    )
    for use in uses:
        with pytest.raises(ModelError, match=r"'.*' was left half-changed by a prune that did not end; load the model"):
            use()
    assert not list(tmp_path.iterdir())


def test_a_prune_whose_result_cannot_be_written_leaves_the_pruned_model(gqa, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OutputError("no space")

    with monkeypatch.context() as patched, pytest.raises(OutputError):
        patched.setattr("llmpruner.pruning.workspace.save", full)
        llmpruner.prune(gqa, ratio=0.2, importance="l1", output=tmp_path / "out")
    assert len(gqa.plans) == 1
    llmpruner.save(gqa, tmp_path / "elsewhere")
    assert llmpruner.load(tmp_path / "elsewhere").plans == gqa.plans


def test_a_model_that_something_else_cut_is_not_saved(gqa, tmp_path):
    group = gqa.graph.by_name["layers.1.mlp"]
    cut(gqa.network, gqa.graph, {group.name: tuple(range(8))}, gqa.family)
    with pytest.raises(ModelError, match=r"parameter 'model.layers.1.mlp.* has shape .*; save what llmpruner.prune"):
        llmpruner.save(gqa, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_trained_in_place_has_its_record(tmp_path, monkeypatch):
    tiny_models.llama().save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "What is it?\n", "completion": "It is so."}) + "\n")
    options = {"data": str(tmp_path / "data.jsonl"), "strategy": "full", "max_steps": 1, "validation": 0}
    model = llmpruner.load(tmp_path / "model")
    assert llmpruner.recover(model, work_dir=tmp_path / "work", **options) is model
    assert len(model.record["recovery"]) == 1
    out = llmpruner.recover(model, output=tmp_path / "out", **options)
    assert out is model and model.form == "stock" and len(llmpruner.discover(tmp_path / "out").record["recovery"]) == 2
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("llmpruner.recovery.strategies.FullStrategy.train", stopped)
        llmpruner.recover(model, work_dir=tmp_path / "other", **options)
    with pytest.raises(ModelError, match="was left half-changed by a recovery that did not end"):
        llmpruner.recover(model, work_dir=tmp_path / "other", **options)


@pytest.mark.parametrize("shape", ["free", "uniform"])
def test_equal_shares_in_many_steps_are_those_of_one(gqa, shape):
    """Each step took an amount that was less than a head, so that MLP channels alone were removed."""
    options = {"kinds": "mlp,attention", "ratio": 0.3, "importance": "l2", "shape": shape, "layers": "all"}
    one, many = (
        {
            kind: sum(gqa.graph.by_name[name].units - len(cut.kept) for name, cut in made.cuts.items() if kind in name)
            for kind in ("mlp", "attention")
        }
        for made in (llmpruner.plan(gqa, **options, steps=steps) for steps in (1, 10))
    )
    assert all(one.values())
    assert one == many


@pytest.fixture
def deep():
    """Of eight layers, of which number 3 changes little."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    network = tiny_models.llama(layers=8, vocab_size=128, **sizes)
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(0.0, 0.2)
        for weight in network.model.layers[3].parameters():
            weight.mul_(0.01)
    return criteria_cases.opened(network, LlamaFamily())


@pytest.mark.parametrize("shape", ["free", "uniform"])
def test_layers_go_in_many_steps_as_in_one(deep, shape):
    """Each step's amount is less than a layer, so that MLP channels alone were removed."""
    options = {"kinds": "layer,mlp", "ratio": 0.3, "importance": "l2", "shape": shape, "layers": "all", "seed": 1}
    one, many = (llmpruner.plan(deep, **options, compensate="none", steps=steps) for steps in (1, 10))
    assert len(many.cuts["layers"].kept) == len(one.cuts["layers"].kept) == 7
    gone = set(range(8)) - set(many.cuts["layers"].kept)
    widths = {len(each.kept) for each in many.cuts.values() if each.kind == "mlp" and each.layer not in gone}
    assert widths <= {63, 64, 65}
    parameters = [restrict(deep.graph, made.kept).decoder_parameters for made in (one, many)]
    assert abs(parameters[0] - parameters[1]) <= 3 * 64


def test_a_ranking_in_many_steps_takes_the_layer_that_is_first(deep):
    """Each step passed over the layers that its amount had no room for, and channels took their place."""
    options = {"kinds": "layer,mlp", "importance": "l2", "shape": "free", "layers": "all"}
    options |= {"allocation": "global", "settings": {"global": {"normalize": "parameters"}}, "compensate": "none"}
    one, many = (llmpruner.plan(deep, ratio=0.3, **options, steps=steps) for steps in (1, 10))
    assert set(range(8)) - set(many.cuts["layers"].kept) == set(range(8)) - set(one.cuts["layers"].kept) == {3}
    for made in (one, many):
        assert abs(restrict(deep.graph, made.kept).decoder_parameters / deep.graph.decoder_parameters - 0.7) < 0.001
    # A layer that the whole amount has no room for is passed over, and the ranking goes on.
    few = [llmpruner.plan(deep, ratio=0.1, **options, steps=steps) for steps in (1, 10)]
    assert few[0].cuts == few[1].cuts and {each.kind for each in few[0].cuts.values()} == {"mlp"}
