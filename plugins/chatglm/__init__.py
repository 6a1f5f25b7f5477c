"""Prompts of ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B and GLM-4, and a reader of their original formats. Their structure,
and what follows a cut, is discovered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmpruner import ChatFormat, CheckpointError, CheckpointReader, ModelFamily, hookimpl, read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

CHAT_FORMAT, ROUNDS, ROLES = "chat_format", "rounds", "roles"
"""Attribute that `ChatGLMReader` adds to a converted configuration, and its values for ChatGLM2 and ChatGLM3."""


class ChatGLM2Format(ChatFormat):
    """Numbered rounds, as in the released ``chat`` method."""

    # The blank is what the tokenizer adds where the released training code encodes an answer.
    answer_separator = " "

    def format_chat(self, history: Sequence[tuple[str, str]], query: str) -> str:
        """A query after earlier rounds of question and answer."""
        rounds = "".join(f"[Round {i}]\n\n问：{q}\n\n答：{a}\n\n" for i, (q, a) in enumerate(history, start=1))
        return f"{rounds}[Round {len(history) + 1}]\n\n问：{query}\n\n答："

    def format_conversation(
        self, exchanges: Sequence[tuple[str, str]], system: str | None = None
    ) -> Sequence[tuple[str, str]]:
        """One pair, as `answer_separator` and the first generation's ``[gMASK]<sop>`` come before the last answer
        alone. The system message is plain text before the first round, as there are no system turns."""
        *history, (query, answer) = exchanges
        before = "" if system is None else self.format_system(system)
        return [(before + self.format_chat(history, query), self.answer_separator + answer)]


class ChatGLMFormat(ChatGLM2Format):
    """The first generation's rounds."""

    answer_separator = ""

    def format_text(self, text: str) -> str:
        """Text as the answer to an empty context, as the context is not trained on."""
        return f"[gMASK]<sop>{text}"

    def format_chat(self, history: Sequence[tuple[str, str]], query: str) -> str:
        if not history:
            return f"{query}[gMASK]<sop>"
        rounds = "".join(f"[Round {i}]\n问：{q}\n答：{a}\n" for i, (q, a) in enumerate(history))
        return f"{rounds}[Round {len(history)}]\n问：{query}\n答：[gMASK]<sop>"


class GlmFormat(ChatFormat):
    """A special token for each role; the tokenizer adds ``[gMASK]<sop>`` before the text."""

    answer_separator: ClassVar[str] = "\n"
    """Before every message."""
    eos_after = "last"

    def format_prompt(self, question: str) -> str:
        return f"<|user|>{self.answer_separator}{question}<|assistant|>"

    def format_system(self, system: str) -> str:
        return f"<|system|>{self.answer_separator}{system}"


class ChatGLM3Format(GlmFormat):
    answer_separator = "\n "  # the released tokenizer adds the blank


class ChatGLMFamily(ModelFamily):
    """Hidden channels cannot be cut exactly, because of LayerNorms over them."""

    name = "chatglm"
    summary = "ChatGLM-6B, the first generation"
    model_types = ("chatglm",)
    chat_format = ChatGLMFormat()

    def register_models(self) -> None:
        """Register model type ``chatglm``. ChatGLM2, ChatGLM3 and GLM-4 in the original format have it too;
        `ChatGLMConfig` refuses their configurations."""
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

        from .configuration_chatglm import ChatGLMConfig
        from .modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
        from .tokenization_chatglm import ChatGLMTokenizer

        AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
        AutoModel.register(ChatGLMConfig, ChatGLMModel, exist_ok=True)
        AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
        AutoTokenizer.register(ChatGLMConfig, ChatGLMTokenizer, exist_ok=True)

    def refresh(self, model: PreTrainedModel) -> None:
        """Nothing to set: modules compute numbers of heads from the shapes of their weights."""


class GlmFamily(ModelFamily):
    """GLM-4 in transformers' own format (``glm`` and ``glm4``, which adds norms after each sub-layer)."""

    name = "glm"
    summary = "GLM-4 in transformers' own format"
    model_types = ("glm", "glm4")
    chat_format: ClassVar[ChatFormat] = GlmFormat()


class ChatGLM2Family(GlmFamily):
    name = "chatglm2"
    summary = "ChatGLM2-6B, converted to GLM: prompts in numbered rounds"
    extends = "glm"
    chat_format = ChatGLM2Format()

    def matches(self, config: PreTrainedConfig) -> bool:
        return super().matches(config) and getattr(config, CHAT_FORMAT, None) == ROUNDS


class ChatGLM3Family(GlmFamily):
    name = "chatglm3"
    summary = "ChatGLM3-6B, converted to GLM: prompts with a special token per role"
    extends = "glm"
    chat_format = ChatGLM3Format()

    def matches(self, config: PreTrainedConfig) -> bool:
        return super().matches(config) and getattr(config, CHAT_FORMAT, None) == ROLES


class ChatGLMReader(CheckpointReader):
    """Reads `GlmForCausalLM`."""

    name = "chatglm-original"
    summary = "ChatGLM2-6B, ChatGLM3-6B and GLM-4 in the original format"

    def recognises(self, path: Path) -> bool:
        try:
            values = read_json(path / "config.json")
        except CheckpointError:
            return False
        # All generations have one model type; from the second on, they have this key.
        return values.get("model_type") == "chatglm" and "multi_query_group_num" in values

    def read_config(self, path: Path) -> PreTrainedConfig:
        from .original import read_config

        return read_config(path)

    def read_model(self, path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
        from .original import read_model

        return read_model(path, dtype)

    def read_tokenizer(self, path: Path) -> Any | None:
        from .original import read_tokenizer

        return read_tokenizer(path)


@hookimpl
def llmpruner_model_families() -> list[type]:
    return [ChatGLMFamily, GlmFamily, ChatGLM2Family, ChatGLM3Family]


@hookimpl
def llmpruner_checkpoint_readers() -> list[type]:
    return [ChatGLMReader]
