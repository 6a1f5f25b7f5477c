"""ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B and GLM-4, in their original formats and in transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpruner import CheckpointError, CheckpointReader, hookimpl, read_json

from .family import ChatGLM2Family, ChatGLM3Family, ChatGLMFamily, GlmFamily

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


class ChatGLMReader(CheckpointReader):
    """ChatGLM2-6B, ChatGLM3-6B and GLM-4 in the original format, read into `GlmForCausalLM`."""

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
