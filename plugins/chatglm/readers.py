"""Readers of the released ChatGLM checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpruner import CheckpointError, CheckpointReader, read_json

from .family import LATER_KEY

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def _peek(path: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint in a released format, empty for any other. Never raises."""
    try:
        values = read_json(path / "config.json")
    except CheckpointError:
        return {}
    return values if values.get("model_type") == "chatglm" else {}


class ChatGLM6BReader(CheckpointReader):
    """ChatGLM-6B (the first generation) as released, and as this plugin saves it."""

    name = "chatglm-6b"
    summary = "ChatGLM-6B, the first generation, as released and as it is saved after pruning"

    def recognises(self, path: Path) -> bool:
        values = _peek(path)
        return bool(values) and LATER_KEY not in values

    def read_config(self, path: Path) -> PreTrainedConfig:
        from .released import read_6b_config

        return read_6b_config(path)

    def read_model(self, path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
        from .released import read_6b_model

        return read_6b_model(path, dtype)

    def read_tokenizer(self, path: Path) -> Any | None:
        from .released import read_6b_tokenizer

        return read_6b_tokenizer(path)


class ChatGLMReader(CheckpointReader):
    """ChatGLM2-6B, ChatGLM3-6B and GLM-4 in the original format, read into `GlmForCausalLM`."""

    name = "chatglm-original"
    summary = "ChatGLM2-6B, ChatGLM3-6B and GLM-4 in the original format"

    def recognises(self, path: Path) -> bool:
        return LATER_KEY in _peek(path)

    def read_config(self, path: Path) -> PreTrainedConfig:
        from .released import read_later_config

        return read_later_config(path)

    def read_model(self, path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
        from .released import read_later_model

        return read_later_model(path, dtype)

    def read_tokenizer(self, path: Path) -> Any | None:
        from .tokenizers import read_glm_tokenizer

        return read_glm_tokenizer(path)
