"""Which modules get adapters, and adapters that are saved alone."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from recovery_cases import pruned_model

from llmpruner import MLP, Blocks, Catalog, CoupledGroup, Role, Span, UnsupportedModelError, build_graph
from llmpruner.models.meta import graph_of
from llmpruner.models.surgery import cut
from llmpruner.recovery.lora import adapter_targets
from llmpruner.recovery.strategies import LoraStrategy
from llmpruner.testing import RecoveryConformance


class TestConformance(RecoveryConformance):
    strategy = LoraStrategy


def test_unmerged_adapters_reproduce_the_merged_model(tiny, tmp_path):
    merged, adapted = (tiny(LoraStrategy(merge=merge), name=str(merge)).model for merge in (True, False))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)
    adapted.save_pretrained(tmp_path / "adapters")
    saved = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert saved["r"] == 8 and saved["lora_alpha"] == 16


def test_merging_keeps_the_dtype(tiny):
    result = tiny(LoraStrategy(), pruned_model(torch.bfloat16))
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}


def test_adapters_for_conv1d_modules(tiny):
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    channel = Blocks(128)
    groups = [
        CoupledGroup(
            f"layers.{n}.mlp",
            MLP,
            128,
            (
                Span(f"transformer.h.{n}.mlp.c_fc.weight", 1, Role.PRODUCES, channel),
                Span(f"transformer.h.{n}.mlp.c_fc.bias", 0, Role.PRODUCES, channel),
                Span(f"transformer.h.{n}.mlp.c_proj.weight", 0, Role.CONSUMES, channel),
            ),
            layer=n,
        )
        for n in range(2)
    ]
    graph = graph_of(model, lambda: groups)
    graph = cut(model, graph, {"layers.1.mlp": range(0, 128, 2)})
    assert model.transformer.h[1].mlp.c_fc.weight.shape == (32, 64)
    result = tiny(LoraStrategy(), (model, graph))
    assert isinstance(result.model.transformer.h[1].mlp.c_fc, Conv1D)
    assert result.details["best_step"] > 0


def test_experts_are_skipped_with_a_note(tiny):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config).eval()
    path, wide = "model.layers.0", Blocks(2, 16)
    experts = f"{path}.mlp.experts.down_proj"
    groups = [
        CoupledGroup("layers.0.mlp", MLP, 16, (Span(experts, 2, Role.CONSUMES, Blocks(16)),), layer=0),
        CoupledGroup(
            "layers.0.attention",
            "attention",
            2,
            (Span(f"{path}.self_attn.o_proj.weight", 1, Role.CONSUMES, wide),),
            layer=0,
        ),
    ]
    graph = graph_of(model, lambda: groups)
    assert adapter_targets(model, graph) == ([f"{path}.self_attn.o_proj"], [experts])
    result = tiny(LoraStrategy(), (model, graph), max_steps=2, learning_rate=1e-4)
    assert "1 parameter of experts gets no adapters" in result.notes[0]
    with pytest.raises(UnsupportedModelError, match="nothing to adapt"):
        adapter_targets(model, graph_of(model, lambda: groups[:1]))


def test_modules_that_peft_refuses_are_skipped_with_a_note(tiny):
    """peft refuses Mamba's output projection, which was a traceback."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    graph = build_graph(Catalog().families["auto"](), model.config)
    path = "backbone.layers.0.mixer"
    assert f"{path}.out_proj" in adapter_targets(model, graph)[0]
    before = copy.deepcopy(model.state_dict())
    result = tiny(LoraStrategy(), (model, graph), max_steps=2, learning_rate=1e-4)
    assert f"2 modules, which peft refuses, get no adapters ({path}.out_proj, …)" in result.notes
    assert not any("experts" in note for note in result.notes)  # the weight of a convolution has three axes, too
    after = result.model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert f"{path}.in_proj.weight" in moved and f"{path}.out_proj.weight" not in moved
