"""Cut models for checkpoint tests: each way to cut a tiny LLaMA, and other classes with groups by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from llmpruner_llama.family import LlamaFamily

from llmpruner import ATTENTION, MLP, Blocks, CoupledGroup, Role, Span, build_graph, layouts
from llmpruner.models.meta import graph_of, meta_model
from llmpruner.models.surgery import cut

LAYERS = 3
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
INPUT_IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8], [2, 7, 18, 28, 18, 28, 45, 9]])


@dataclass(frozen=True)
class Case:
    """``kept`` by group; ``model_class``: that the checkpoint must have, of a shim where its name begins with
    *Pruned*."""

    kept: Mapping[str, Sequence[int]]
    model_class: str
    options: Mapping[str, Any] = field(default_factory=dict)


def every_layer(kind: str, kept: Sequence[int]) -> dict[str, Sequence[int]]:
    return {f"layers.{n}.{kind}": kept for n in range(LAYERS)}


MHA = {"num_key_value_heads": 4}
TIED = {"tie_word_embeddings": True}
SHIM, STOCK, MISTRAL = "PrunedLlamaForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"

LLAMA = {
    "nothing": Case({}, STOCK),
    "mlp": Case({"layers.0.mlp": range(40), "layers.2.mlp": range(3, 20)}, SHIM),
    "mlp-tied": Case({"layers.1.mlp": range(7)}, SHIM, TIED),
    "mlp-uniform": Case(every_layer("mlp", range(5, 35)), STOCK, TIED),
    "mha": Case({"layers.1.attention": [1, 3], "layers.2.attention": [0, 1, 3]}, SHIM, MHA),
    "gqa": Case({"layers.0.attention": [1]}, SHIM),
    "mha-indivisible": Case(every_layer("attention", [0, 2, 3]), MISTRAL, MHA),
    "gqa-uniform": Case(every_layer("attention", [1]), STOCK),
    "query": Case({"layers.0.query": [1, 2], "layers.1.mlp": range(8)}, SHIM, TIED),
    "query-uniform": Case(every_layer("query", [0, 3]), STOCK),
    "hidden": Case({"hidden": range(4, 28)}, STOCK),
    "hidden-tied-indivisible": Case({"hidden": range(21)}, MISTRAL, TIED),
    "depth": Case({"layers": [0, 2]}, STOCK),
    "depth-mlp": Case({"layers": [0, 2], "layers.2.mlp": range(30)}, SHIM),
    "all-uniform": Case(
        {
            "hidden": range(24), "layers": [1, 2], **every_layer("mlp", range(30)),
            **every_layer("attention", [1, 2, 3]),
        }, STOCK, MHA,
    ),
    "all": Case(
        {"hidden": range(20), "layers": [1, 2], "layers.2.mlp": range(30), "layers.1.attention": [0]}, SHIM, TIED
    ),
}  # fmt: skip
UNEVEN = {"layers.1.attention": [0], "layers.0.mlp": range(9)}


def cut_llama(name: str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    case = LLAMA[name]
    config = LlamaConfig(**{**SIZES, **case.options})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype).eval()
    cut(model, build_graph(LlamaFamily(), config), case.kept, LlamaFamily())
    return model


def grouped(n: int) -> CoupledGroup:
    q, k, v, o = (f"model.layers.{n}.self_attn.{m}_proj" for m in "qkvo")
    spans = layouts.grouped_query_attention(q, k, v, o, 4, 2, 8)
    return CoupledGroup(f"layers.{n}.attention", ATTENTION, 2, spans)


def gated(n: int) -> CoupledGroup:
    gate, up, down = (f"model.layers.{n}.mlp.{m}_proj" for m in ("gate", "up", "down"))
    return CoupledGroup(f"layers.{n}.mlp", MLP, 48, layouts.gated_mlp(gate, up, down, 48))


def packed(n: int) -> CoupledGroup:
    gate_up, down = (f"model.layers.{n}.mlp.{m}_proj" for m in ("gate_up", "down"))
    rows = (*layouts.produces(gate_up, Blocks(48)), *layouts.produces(gate_up, Blocks(48, start=48)))
    return CoupledGroup(f"layers.{n}.mlp", MLP, 48, (*rows, *layouts.consumes(down, Blocks(48))))


def _cut(
    prefix: str,
    sizes: Mapping[str, Any],
    groups: Callable[[int], list[CoupledGroup]],
    kept: Mapping[str, Sequence[int]] = UNEVEN,
) -> Any:
    import transformers

    config = getattr(transformers, f"{prefix}Config")(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    graph = graph_of(meta_model(config), [group for n in range(LAYERS) for group in groups(n)])
    cut(model, graph, kept)
    return model


def cut_qwen2() -> Any:
    def groups(n: int) -> list[CoupledGroup]:
        q, k, v, o = (f"model.layers.{n}.self_attn.{m}_proj" for m in "qkvo")
        spans = [
            *layouts.produces(q, Blocks(2, 16), bias=True),
            *(s for m in (k, v) for s in layouts.produces(m, Blocks(2, 8), bias=True)),
            *layouts.consumes(o, Blocks(2, 16)),
        ]
        return [CoupledGroup(f"layers.{n}.attention", ATTENTION, 2, tuple(spans)), gated(n)]

    kept = {"layers.0.attention": [1], "layers.1.mlp": range(17)}
    return _cut("Qwen2", {**SIZES, "layer_types": ["full_attention"] * LAYERS}, groups, kept)


def cut_gemma2() -> Any:
    sizes = {**SIZES, "query_pre_attn_scalar": 8, "sliding_window": 4, "hidden_activation": "gelu_pytorch_tanh"}
    return _cut("Gemma2", sizes, lambda n: [grouped(n), gated(n)])


def cut_glm() -> Any:
    return _cut("Glm", {**SIZES, "attention_bias": False}, lambda n: [grouped(n), packed(n)])


def cut_phi3() -> Any:
    def groups(n: int) -> list[CoupledGroup]:
        qkv, o = (f"model.layers.{n}.self_attn.{m}_proj" for m in ("qkv", "o"))
        query = Blocks(2, 16)
        fused = [s for index in (query, Blocks(2, 8, 32), Blocks(2, 8, 48)) for s in layouts.produces(qkv, index)]
        spans = (*fused, *layouts.consumes(o, query))
        return [CoupledGroup(f"layers.{n}.attention", ATTENTION, 2, spans), packed(n)]

    model = _cut("Phi3", {k: v for k, v in SIZES.items() if k != "head_dim"}, groups)
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config.num_attention_heads, attention.config.num_key_value_heads = 2, 1
    attention.num_key_value_heads = 1
    return model


def cut_gpt_neox() -> Any:
    def groups(n: int) -> list[CoupledGroup]:
        path = f"gpt_neox.layers.{n}"
        qkv, dense = (f"{path}.attention.{m}" for m in ("query_key_value", "dense"))
        attention = (*layouts.produces(qkv, Blocks(4, 24), bias=True), *layouts.consumes(dense, Blocks(4, 8)))
        mlp = layouts.two_layer_mlp(f"{path}.mlp.dense_h_to_4h", f"{path}.mlp.dense_4h_to_h", 48)
        return [
            CoupledGroup(f"layers.{n}.attention", ATTENTION, 4, attention),
            CoupledGroup(f"layers.{n}.mlp", MLP, 48, mlp),
        ]

    sizes = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
    return _cut("GPTNeoX", sizes, groups, {**UNEVEN, "layers.1.attention": [0, 2, 3]})


MIXTRAL = {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2}


def cut_mixtral() -> Any:
    def groups(n: int) -> list[CoupledGroup]:
        gate_up, down = (f"model.layers.{n}.mlp.experts.{m}_proj" for m in ("gate_up", "down"))
        spans = (
            Span(gate_up, 1, Role.PRODUCES, Blocks(48)),
            Span(gate_up, 1, Role.PRODUCES, Blocks(48, start=48)),
            Span(down, 2, Role.CONSUMES, Blocks(48)),
        )
        return [grouped(n), CoupledGroup(f"layers.{n}.mlp", MLP, 48, spans)]

    return _cut("Mixtral", MIXTRAL, groups, {"layers.1.attention": [0], "layers.0.mlp": range(16)})


def cut_mixtral_uniform() -> Any:
    def groups(n: int) -> list[CoupledGroup]:
        names = (
            f"model.layers.{n}.mlp.{part}" for part in ("experts.gate_up_proj", "experts.down_proj", "gate.weight")
        )
        spans = tuple(Span(name, 0, Role.PRODUCES, Blocks(3)) for name in names)
        return [CoupledGroup(f"layers.{n}.expert", "expert", 3, spans)]

    model = _cut("Mixtral", MIXTRAL, groups, every_layer("expert", [0, 2]))
    for layer in model.model.layers:
        layer.mlp.experts.num_experts = layer.mlp.gate.num_experts = 2
    return model


EVERY: dict[str, tuple[Callable[[], Any], str]] = {
    **{name: (partial(cut_llama, name), case.model_class) for name, case in LLAMA.items()},
    "qwen2": (cut_qwen2, "PrunedQwen2ForCausalLM"),
    "gemma2": (cut_gemma2, "PrunedGemma2ForCausalLM"),
    "glm": (cut_glm, "PrunedGlmForCausalLM"),
    "phi3": (cut_phi3, "PrunedPhi3ForCausalLM"),
    "gpt_neox": (cut_gpt_neox, "PrunedGPTNeoXForCausalLM"),
    "mixtral": (cut_mixtral, "PrunedMixtralForCausalLM"),
    "mixtral-experts-uniform": (cut_mixtral_uniform, "MixtralForCausalLM"),
}
"""Cut model, and the class that its checkpoint must have."""
