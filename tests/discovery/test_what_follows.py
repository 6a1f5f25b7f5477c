"""What must follow a cut besides parameters: numbers that modules keep, also of groups that a family adjusts; and
buffers with an entry per unit."""

import copy
from dataclasses import replace

import pytest
import torch
from composed import ComposedConfig
from transformers import (
    CONFIG_MAPPING,
    FalconH1Config,
    Glm4MoeConfig,
    GPT2Config,
    LongcatFlashConfig,
    MambaConfig,
    ZayaConfig,
)

from llmpruner import Blocks, CoupledGroup, ModelFamily, Structure, UnsupportedModelError, api
from llmpruner.discovery import cut as rules
from llmpruner.discovery.cut import cut
from llmpruner.discovery.follow import Follow, apply_rules
from llmpruner.discovery.groups import build_graph, discover_graph
from llmpruner.discovery.oracle import FAILED, REFUSED, VERIFIED, Oracle, logits
from llmpruner.discovery.tiny import random_instance, small_config
from llmpruner.discovery.verify import check_kinds, verify
from llmpruner.models.family import AutoFamily
from llmpruner.models.meta import graph_of
from llmpruner.models.opening import load_pruned
from llmpruner.models.save import save_checkpoint
from llmpruner.models.surgery import cut_tensors, silence
from llmpruner.structure.coupling import Explicit

SIZES = {"n_layer": 3, "n_embd": 48, "n_head": 6, "n_inner": 40, "vocab_size": 96, "n_positions": 64}
SMALL = GPT2Config(**SIZES)


class Renames(ModelFamily):
    """Gives its heads a kind of its own."""

    def coupled_groups(self, config):
        groups = [g for g in discover_graph(config).groups if g.kind == "attention"]
        return [replace(g, word="gadget", kind="gadget") for g in groups]


def assert_silent(model, graph, kept, config):
    """``model`` has the logits of a whole one without the units that are not ``kept``."""
    reference, ids = random_instance(config), torch.arange(9)[None]
    silence(reference, graph, kept)
    torch.testing.assert_close(logits(model, ids), logits(reference, ids), atol=1e-5, rtol=1e-5)


def test_what_must_follow_is_found_for_adjusted_groups():
    family = Renames()
    graph, kept = build_graph(family, SMALL), {"layers.0.gadget": [0, 2, 5], "layers.1.gadget": [1, 3]}
    smaller = random_instance(SMALL)
    cut(smaller, graph, kept, family)
    assert_silent(smaller, graph, kept, SMALL)
    assert smaller.transformer.h[0].attn.split_size == 24


@pytest.mark.slow
def test_rules_are_found_once_for_an_architecture_and_kind(monkeypatch):
    asked = []

    def counting(*arguments, **options):
        asked.append(options["kinds"])
        return verify(*arguments, **options)

    monkeypatch.setattr(rules, "verify", counting)
    monkeypatch.setattr(rules, "_VERDICTS", {})
    first = rules.rules_of(SMALL, ["attention"], AutoFamily())
    assert first == (Follow("attention", "transformer.h.*.attn", "split_size"),)
    larger = GPT2Config(**SIZES | {"n_layer": 12, "n_inner": 400})
    assert rules.rules_of(larger, ["attention"], AutoFamily()) == first
    rules.rules_of(SMALL, ["attention", "mlp"], AutoFamily())
    assert asked == [["attention"], ["mlp"]]
    rules.rules_of(GPT2Config(reorder_and_upcast_attn=True), ["mlp"], AutoFamily())
    assert asked[2:] == [["mlp"]], "a flag makes another architecture"


def test_a_kind_that_small_models_lack_is_refused():
    graph = build_graph(Renames(), SMALL)
    (verdict,) = api.verify(Structure("gpt2", SMALL, AutoFamily(), graph))
    assert (verdict.kind, verdict.verdict, verdict.checks) == ("gadget", REFUSED, [])
    with pytest.raises(UnsupportedModelError, match="cutting gadget units of a gpt2 model is refused: a small model"):
        rules.rules_of(SMALL, ["gadget"], AutoFamily())


def test_families_that_declare_everything_trace_nothing(monkeypatch):
    monkeypatch.setattr("llmpruner.discovery.groups.discover_graph", pytest.fail)
    groups = (CoupledGroup("layers", "layer", 3),)
    family = type("Declared", (ModelFamily,), {"coupled_groups": lambda self, config: groups})()
    assert build_graph(family, SMALL).blocked == ()


def test_an_equal_number_of_another_module_stays():
    """Jamba's `time_step_rank` follows the cut of its own channels, which are of the kind `mlp` as those of the layer's
    MLP are. After a first cut, the MLP had as many as the rank, and a second cut made the rank smaller too."""
    small = small_config(CONFIG_MAPPING["jamba"]())
    model, graph = random_instance(small, 0), build_graph(AutoFamily(), small)
    rules = [Follow("mlp", "model.layers.*.mamba", "time_step_rank")]
    rank = model.get_submodule("model.layers.0.mamba").time_step_rank
    (mlp,) = [g for g in graph.of_kinds(["mlp"]) if g.layer == 0 and "feed_forward" in g.spans[0].parameter]
    first = {mlp.name: tuple(range(rank))}
    again = cut_tensors(model, graph, first)
    apply_rules(rules, model, graph, first)
    assert again.by_name[mlp.name].units == rank
    half = {mlp.name: tuple(range(rank // 2))}
    cut_tensors(model, again, half)
    apply_rules(rules, model, again, half)
    assert model.get_submodule("model.layers.0.mamba").time_step_rank == rank
    assert_silent(model, graph, half, small)


def test_two_groups_of_a_module_with_equal_numbers_of_units():
    """Mamba's rank and channels are of one kind and lie in one module. With as many of each, `time_step_rank` followed
    the channels, so that the cut model could not run."""
    config = MambaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    family = AutoFamily()
    model, graph = random_instance(config, 0), build_graph(family, config)
    rank, channels = [
        [g for g in graph.of_kinds(["mlp"]) if any(s.parameter.endswith(end) and s.axis == 1 for s in g.spans)]
        for end in ("dt_proj.weight", "out_proj.weight")
    ]
    assert {g.units for g in (*rank, *channels)} == {32}
    kept = {g.name: tuple(range(1, 28)) for g in channels} | {g.name: tuple(range(3, 23)) for g in rank}
    cut(model, graph, kept, family)
    assert [model.get_submodule(f"backbone.layers.{n}.mixer").time_step_rank for n in range(2)] == [20, 20]
    assert_silent(model, graph, kept, config)


# Buffers


SCALED = ComposedConfig(scaled=True)


def experts(**changes):
    return small_config(Glm4MoeConfig(**changes))


def test_the_selection_bias_belongs_to_the_experts():
    graph = discover_graph(experts())
    (span,) = graph.by_name["layers.1.experts"].buffers
    assert span.parameter == "model.layers.1.mlp.gate.e_score_correction_bias"
    assert (span.axis, span.index) == (0, Blocks(8))
    assert not any(g.buffers for g in graph.groups if g.kind != "expert"), "rotary frequencies belong to no unit"


class CountsExperts(ModelFamily):
    """Sets the counts, so that a wrong map is not covered up by a search for attributes."""

    def refresh(self, model):
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.num_experts = layer.mlp.experts.num_experts = len(layer.mlp.gate.weight)


def test_the_oracle_notices_a_bias_given_to_other_experts():
    config = experts()
    graph = discover_graph(config)

    def reverse(group):
        rows = Explicit(tuple((7 - unit,) for unit in range(8)))
        return replace(group, buffers=tuple(replace(s, index=rows) for s in group.buffers))

    oracle = Oracle(config, graph, CountsExperts(), 0)
    assert oracle.judge("expert").verdict == VERIFIED
    oracle.graph = replace(graph, groups=tuple(reverse(g) if g.kind == "expert" else g for g in graph.groups))
    assert oracle.judge("expert").verdict == FAILED


@pytest.mark.slow
def test_groups_of_experts_keep_the_same_number_each():
    config = experts(n_group=4, topk_group=2)
    group = discover_graph(config).by_name["layers.1.experts"]
    assert (config.n_group, group.units, group.blocks) == (2, 8, 2)
    assert group.minimum == 2 * config.num_experts_per_tok, "all that are chosen may come from one group"
    (verdict,) = check_kinds(AutoFamily(), config, kinds=["expert"])
    assert verdict.verdict == VERIFIED, verdict
    assert "save and load" in verdict.checks


@pytest.mark.parametrize("config", [ZayaConfig, LongcatFlashConfig])
def test_a_choice_that_may_be_a_fixed_position_is_not_offered(config):
    graph = discover_graph(small_config(config()))
    assert "expert" not in graph.kinds
    assert any("a choice is read as a number" in b.reason for b in graph.blocked)


@pytest.mark.parametrize("keeps", [range(20), range(5, 40, 3)], ids=["first", "spread"])
def test_a_computed_buffer_is_cut_and_saved_from_then_on(keeps, tmp_path):
    graph = discover_graph(SCALED)
    kept = {f"layers.{n}.mlp": list(keeps)[n:] for n in range(2)}
    assert [str(s) for s in graph.by_name["layers.0.mlp"].buffers] == ["layers.0.mlp.scale[axis 0] 0:40 (produces)"]
    model = random_instance(SCALED)
    expected = copy.deepcopy(model.layers[1].mlp.scale[list(kept["layers.1.mlp"])])
    cut(model, graph, kept, AutoFamily())
    assert save_checkpoint(model, tmp_path / "pruned", record={}) == "shim"
    loaded = load_pruned(tmp_path / "pruned")
    assert torch.equal(loaded.layers[1].mlp.scale, expected)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_buffer_that_is_not_saved_is_computed_again_for_a_cut_model(tmp_path):
    """Falcon-H1 fills the factors of its state spaces when weights are initialized, in a module without any."""
    model = random_instance(small_config(FalconH1Config()))
    graph = graph_of(model, discover_graph(model.config).groups)
    cut_tensors(model, graph, {"layers.1.mlp": [0, 3, 4]})
    save_checkpoint(model, tmp_path / "cut", record={})
    loaded = load_pruned(tmp_path / "cut")
    for name, buffer in model.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name
