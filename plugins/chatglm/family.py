"""The coupled structure of ChatGLM-6B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from llmpruner import ATTENTION, LAYER, MLP, CoupledGroup, ModelFamily, layouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .configuration_chatglm import ChatGLMConfig


def register() -> None:
    """Register model type ``chatglm`` with AutoConfig, AutoModel, AutoModelForCausalLM and AutoTokenizer.

    ChatGLM2, ChatGLM3 and GLM-4 in the original format have the same model type; `ChatGLMConfig` refuses their
    configurations. Repeated calls have no further effect.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from .configuration_chatglm import ChatGLMConfig
    from .modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
    from .tokenization_chatglm import ChatGLMTokenizer

    AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
    AutoModel.register(ChatGLMConfig, ChatGLMModel, exist_ok=True)
    AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
    AutoTokenizer.register(ChatGLMConfig, ChatGLMTokenizer, exist_ok=True)


class ChatGLMFamily(ModelFamily):
    """ChatGLM-6B, the first generation. Its hidden channels cannot be cut exactly, because of LayerNorms over them."""

    name = "chatglm"
    summary = "ChatGLM-6B, the first generation"
    model_types = ("chatglm",)
    answer_separator: ClassVar[str] = ""
    one_answer_per_text: ClassVar[bool] = True

    def register_models(self) -> None:
        """Register ``model_type: chatglm`` with the auto classes of transformers."""
        register()

    def coupled_groups(self, config: ChatGLMConfig) -> Sequence[CoupledGroup]:
        groups = []
        layers = [f"transformer.layers.{n}" for n in range(config.num_layers)]
        for n, path in enumerate(layers):
            heads = layouts.interleaved_qkv_attention(
                f"{path}.attention.query_key_value",
                f"{path}.attention.dense",
                config.num_attention_heads,
                config.head_dim or config.hidden_size // config.num_attention_heads,
                bias=True,
            )
            channels = layouts.two_layer_mlp(
                f"{path}.mlp.dense_h_to_4h", f"{path}.mlp.dense_4h_to_h", config.inner_hidden_size
            )
            groups += [
                CoupledGroup(f"layers.{n}.attention", ATTENTION, config.num_attention_heads, heads, layer=n),
                CoupledGroup(f"layers.{n}.mlp", MLP, config.inner_hidden_size, channels, layer=n),
            ]
        groups.append(layouts.vocabulary(config.vocab_size, "transformer.word_embeddings", "lm_head"))
        groups.append(CoupledGroup("layers", LAYER, config.num_layers, modules=tuple(layers)))
        return groups

    def refresh(self, model: PreTrainedModel, counts: Mapping[str, int]) -> None:
        """Nothing to set: modules compute numbers of heads from the shapes of their weights."""

    def format_prompt(self, instruction: str, input: str = "") -> str:
        """The query alone, as the released model was tuned, and the two tokens before an answer."""
        return f"{_query(instruction, input)}[gMASK]<sop>"

    def format_text(self, text: str) -> str:
        """Text as the answer to an empty context, as the context is not trained on."""
        return f"[gMASK]<sop>{text}"

    def format_chat(self, history: Sequence[tuple[str, str]], query: str) -> str:
        """A query after earlier rounds of question and answer, in the format of the released ``chat`` method."""
        if not history:
            return self.format_prompt(query)
        rounds = "".join(f"[Round {i}]\n问：{q}\n答：{a}\n" for i, (q, a) in enumerate(history))
        return f"{rounds}[Round {len(history)}]\n问：{query}\n答：[gMASK]<sop>"

    def format_conversation(
        self, exchanges: Sequence[tuple[str, str]], system: str | None = None
    ) -> Sequence[tuple[str, str]]:
        """One pair, as ``[gMASK]<sop>`` is before the last answer alone."""
        *history, (query, answer) = exchanges
        before = "" if system is None else self.format_system(system)
        return [(before + self.format_chat(history, query), self.answer_separator + answer)]


def _query(instruction: str, input: str) -> str:
    return f"{instruction}\n{input}" if input else instruction
