"""Buffers with an entry per unit: the selection bias of experts, computed scales of channels."""

import copy
from dataclasses import replace

import pytest
import torch
from composed import ComposedConfig
from transformers import FalconH1Config, Glm4MoeConfig, ZayaConfig

from llmpruner import Blocks, ModelFamily
from llmpruner.discovery.cut import cut
from llmpruner.discovery.groups import discover_graph
from llmpruner.discovery.oracle import FAILED, VERIFIED, Oracle
from llmpruner.discovery.tiny import random_instance, small_config
from llmpruner.discovery.verify import check_kinds
from llmpruner.models.family import AutoFamily
from llmpruner.models.meta import graph_of
from llmpruner.models.opening import load_pruned
from llmpruner.models.save import save_checkpoint
from llmpruner.models.surgery import cut_tensors
from llmpruner.structure.coupling import Explicit

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


def test_a_choice_that_may_be_a_fixed_position_is_not_offered():
    graph = discover_graph(small_config(ZayaConfig()))
    assert "expert" not in graph.kinds
    assert any("replaced by a fixed position" in b.reason for b in graph.blocked)


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
