"""LLaMA: Hugging Face checkpoints with any number of KV heads."""

from __future__ import annotations

from llmpruner import hookimpl

from .family import LlamaFamily


@hookimpl
def llmpruner_model_families() -> list[type]:
    return [LlamaFamily]
