"""Which modules get adapters, and adapters that are saved alone."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from llmpruner import MLP, Blocks, Catalog, CoupledGroup, Role, Span, UnsupportedModelError, build_graph
from llmpruner.models.meta import graph_of
from llmpruner.models.surgery import cut
from llmpruner.recovery.strategies import LoraStrategy, adapter_targets


def test_experts_are_skipped():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=300, hidden_size=32, intermediate_size=16, num_hidden_layers=1, **heads)
    model = MixtralForCausalLM(config).eval()
    path, wide = "model.layers.0", Blocks(2, 16)
    experts = f"{path}.mlp.experts.down_proj"
    groups = [
        CoupledGroup("layers.0.mlp", MLP, 16, (Span(experts, 2, Role.CONSUMES, Blocks(16)),)),
        CoupledGroup(
            "layers.0.attention",
            "attention",
            2,
            (Span(f"{path}.self_attn.o_proj.weight", 1, Role.CONSUMES, wide),),
        ),
    ]
    graph = graph_of(model, groups)
    assert adapter_targets(model, graph) == [f"{path}.self_attn.o_proj"]
    with pytest.raises(UnsupportedModelError, match="nothing to adapt"):
        adapter_targets(model, graph_of(model, groups[:1]))


def test_adapters_for_conv1d_modules(tiny):
    from transformers.pytorch_utils import Conv1D

    model = tiny_models.gpt2(positions=64)
    graph = build_graph(Catalog().families["auto"](), model.config)
    graph = cut(model, graph, {"layers.1.mlp": range(0, 64, 2)})
    result = tiny(LoraStrategy(), (model, graph))
    assert isinstance(result.model.transformer.h[1].mlp.c_fc, Conv1D)
    assert result.record["best_step"] > 0


def test_modules_that_peft_refuses_are_named(tiny):
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    graph = build_graph(Catalog().families["auto"](), model.config)
    with pytest.raises(UnsupportedModelError, match="peft has no adapters for a mamba model"):
        tiny(LoraStrategy(), (model, graph))
