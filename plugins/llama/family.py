"""The coupled structure of LLaMA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmpruner import ATTENTION, HIDDEN, LAYER, MLP, QUERY, CoupledGroup, ModelFamily, layouts

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel


class LlamaFamily(ModelFamily):
    name = "llama"
    summary = "LLaMA 1, 2 and 3, and every model of their type"
    model_types = ("llama",)

    def coupled_groups(self, config: LlamaConfig) -> Sequence[CoupledGroup]:
        count = config.num_hidden_layers
        layers = [f"model.layers.{n}" for n in range(count)]
        outputs, downs = ([f"{p}.{m}" for p in layers] for m in ("self_attn.o_proj", "mlp.down_proj"))
        hidden = layouts.hidden_channels(
            config.hidden_size,
            embeddings=["model.embed_tokens"],
            consumers=[
                *(f"{p}.self_attn.{m}" for p in layers for m in ("q_proj", "k_proj", "v_proj")),
                *(f"{p}.mlp.{m}" for p in layers for m in ("gate_proj", "up_proj")),
                "lm_head",
            ],
            producers=[*outputs, *downs],
            biased=[*(outputs if config.attention_bias else ()), *(downs if config.mlp_bias else ())],
            norms=[
                *(f"{p}.{m}" for p in layers for m in ("input_layernorm", "post_attention_layernorm")),
                "model.norm",
            ],
        )
        return [
            *(group for n in range(count) for group in self._layer(config, n)),
            CoupledGroup("hidden", HIDDEN, config.hidden_size, hidden),
            layouts.vocabulary(config.vocab_size, "model.embed_tokens", "lm_head"),
            CoupledGroup("layers", LAYER, count),
        ]

    def _layer(self, config: LlamaConfig, n: int) -> list[CoupledGroup]:
        path = f"model.layers.{n}"
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        q, k, v, o = (f"{path}.self_attn.{m}_proj" for m in "qkvo")
        gate, up, down = (f"{path}.mlp.{m}_proj" for m in ("gate", "up", "down"))
        attention = layouts.grouped_query_attention(
            q, k, v, o, heads, kv_heads, config.head_dim, bias=config.attention_bias
        )
        mlp = layouts.gated_mlp(gate, up, down, config.intermediate_size, bias=config.mlp_bias)
        groups = [
            CoupledGroup(f"layers.{n}.attention", ATTENTION, kv_heads, attention),
            CoupledGroup(f"layers.{n}.mlp", MLP, config.intermediate_size, mlp),
        ]
        if heads > kv_heads:
            spans = layouts.query_heads(q, o, heads, config.head_dim, bias=config.attention_bias)
            groups.append(CoupledGroup(f"layers.{n}.query", QUERY, heads, spans, blocks=kv_heads, minimum=kv_heads))
        return groups

    def refresh(self, model: PreTrainedModel) -> None:
        """Set the number of query heads per KV head, by which eager attention repeats keys."""
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features

    def stock_configs(self, config: PreTrainedConfig) -> Sequence[PreTrainedConfig]:
        """Mistral without a sliding window: as LLaMA, but the hidden size need not be a multiple of the heads."""
        from transformers import MistralConfig

        if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
            return ()
        skip = {"model_type", "architectures", "transformers_version", "attention_bias", "mlp_bias", "pretraining_tp"}
        values = {k: v for k, v in config.to_dict().items() if k not in skip}
        return [MistralConfig(**values, sliding_window=None, architectures=["MistralForCausalLM"])]
