"""The coupled structure of GLM, and the prompts of the generations that share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from llmpruner import ATTENTION, HIDDEN, LAYER, MLP, QUERY, CoupledGroup, ModelFamily, layouts

if TYPE_CHECKING:
    from transformers import GlmConfig, PreTrainedConfig, PreTrainedModel

CHAT_FORMAT = "chat_format"
"""Attribute that `ChatGLMReader` adds to a converted configuration: `ROUNDS` for prompts of ChatGLM2, `ROLES` for those
of ChatGLM3."""
ROUNDS = "rounds"
ROLES = "roles"
LATER_KEY = "multi_query_group_num"
"""A key of the released ``config.json`` from ChatGLM2 on; all generations have one model type."""


class GlmFamily(ModelFamily):
    """GLM-4 in transformers' own format (``glm`` and ``glm4``, which adds norms after each sub-layer)."""

    name = "glm"
    summary = "GLM-4 in transformers' own format"
    model_types = ("glm", "glm4")
    answer_separator: ClassVar[str] = "\n"
    eos_after: ClassVar[Literal["every", "last", "none"]] = "last"

    def coupled_groups(self, config: GlmConfig) -> Sequence[CoupledGroup]:
        groups = []
        for n in range(config.num_hidden_layers):
            groups += self._layer(config, n)
        layers = [f"model.layers.{n}" for n in range(config.num_hidden_layers)]
        post_norms = ("post_self_attn_layernorm", "post_mlp_layernorm") if config.model_type == "glm4" else ()
        hidden = layouts.hidden_channels(
            config.hidden_size,
            embeddings=["model.embed_tokens"],
            consumers=[
                *(f"{p}.self_attn.{m}_proj" for p in layers for m in "qkv"),
                *(f"{p}.mlp.gate_up_proj" for p in layers),
                "lm_head",
            ],
            producers=[f"{p}.{m}" for p in layers for m in ("self_attn.o_proj", "mlp.down_proj")],
            norms=[
                *(f"{p}.{m}" for p in layers for m in ("input_layernorm", "post_attention_layernorm", *post_norms)),
                "model.norm",
            ],
        )
        groups.append(CoupledGroup("hidden", HIDDEN, config.hidden_size, hidden))
        groups.append(layouts.vocabulary(config.vocab_size, "model.embed_tokens", "lm_head"))
        groups.append(CoupledGroup("layers", LAYER, config.num_hidden_layers, modules=tuple(layers)))
        return groups

    def _layer(self, config: GlmConfig, n: int) -> list[CoupledGroup]:
        path = f"model.layers.{n}"
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads or heads
        head_dim = config.head_dim or config.hidden_size // heads
        bias = config.attention_bias
        q, k, v, o = (f"{path}.self_attn.{m}_proj" for m in "qkvo")
        attention = layouts.grouped_query_attention(q, k, v, o, heads, kv_heads, head_dim, bias=bias)
        mlp = layouts.packed_gated_mlp(f"{path}.mlp.gate_up_proj", f"{path}.mlp.down_proj", config.intermediate_size)
        groups = [
            CoupledGroup(f"layers.{n}.attention", ATTENTION, kv_heads, attention, layer=n),
            CoupledGroup(f"layers.{n}.mlp", MLP, config.intermediate_size, mlp, layer=n),
        ]
        if heads > kv_heads:
            spans = layouts.query_heads(q, o, heads, head_dim, bias=bias)
            groups.append(
                CoupledGroup(f"layers.{n}.query", QUERY, heads, spans, layer=n, blocks=kv_heads, minimum=kv_heads)
            )
        return groups

    def refresh(self, model: PreTrainedModel, counts: Mapping[str, int]) -> None:
        """Set the number of query heads per KV head, by which eager attention repeats keys."""
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features

    def format_prompt(self, instruction: str, input: str = "") -> str:
        """The prompt of GLM-4; its tokenizer adds ``[gMASK]<sop>`` before it."""
        return f"<|user|>\n{_query(instruction, input)}<|assistant|>"

    def format_system(self, system: str) -> str:
        """A turn with the role ``<|system|>``."""
        return f"<|system|>{self.answer_separator}{system}"


class ChatGLM2Family(GlmFamily):
    """ChatGLM2-6B, converted to GLM: prompts in numbered rounds."""

    name = "chatglm2"
    summary = "ChatGLM2-6B, converted to GLM: prompts in numbered rounds"
    extends = "glm"
    answer_separator = " "
    one_answer_per_text: ClassVar[bool] = True

    def matches(self, config: PreTrainedConfig) -> bool:
        return super().matches(config) and getattr(config, CHAT_FORMAT, None) == ROUNDS

    def format_prompt(self, instruction: str, input: str = "") -> str:
        return self.format_chat((), _query(instruction, input))

    def format_system(self, system: str) -> str:
        """Plain text before the first round, as the format has no system turns."""
        return f"{system}\n\n"

    def format_chat(self, history: Sequence[tuple[str, str]], query: str) -> str:
        """A query after earlier rounds of question and answer, in the format of the released ``chat`` method."""
        rounds = "".join(f"[Round {i}]\n\n问：{q}\n\n答：{a}\n\n" for i, (q, a) in enumerate(history, start=1))
        return f"{rounds}[Round {len(history) + 1}]\n\n问：{query}\n\n答："

    def format_conversation(
        self, exchanges: Sequence[tuple[str, str]], system: str | None = None
    ) -> Sequence[tuple[str, str]]:
        """One pair, as there is a blank before the last answer alone: the one that the tokenizer adds where the
        released training code encodes an answer by itself."""
        *history, (query, answer) = exchanges
        before = "" if system is None else self.format_system(system)
        return [(before + self.format_chat(history, query), self.answer_separator + answer)]


class ChatGLM3Family(GlmFamily):
    """ChatGLM3-6B, converted to GLM: prompts with a special token per role."""

    name = "chatglm3"
    summary = "ChatGLM3-6B, converted to GLM: prompts with a special token per role"
    extends = "glm"
    answer_separator = "\n "

    def matches(self, config: PreTrainedConfig) -> bool:
        return super().matches(config) and getattr(config, CHAT_FORMAT, None) == ROLES

    def format_prompt(self, instruction: str, input: str = "") -> str:
        return self.format_chat((), _query(instruction, input))

    def format_chat(self, history: Sequence[tuple[str, str]], query: str) -> str:
        """A query after earlier rounds of question and answer. The blank after each line break is the one that the
        released tokenizer adds before every message."""
        rounds = "".join(f"<|user|>\n {q}<|assistant|>\n {a}" for q, a in history)
        return f"{rounds}<|user|>\n {query}<|assistant|>"


def _query(instruction: str, input: str) -> str:
    return f"{instruction}\n{input}" if input else instruction
