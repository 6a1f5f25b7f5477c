"""LLaMA: Hugging Face checkpoints with any number of KV heads, and Meta's official format."""

from __future__ import annotations

from llmpruner import hookimpl

from .family import LlamaFamily
from .meta import MetaExporter, MetaReader

__all__ = ["LlamaFamily", "MetaExporter", "MetaReader"]


@hookimpl
def llmpruner_model_families() -> list[type]:
    return [LlamaFamily]


@hookimpl
def llmpruner_checkpoint_readers() -> list[type]:
    return [MetaReader]


@hookimpl
def llmpruner_exporters() -> list[type]:
    return [MetaExporter]
