"""LLaMA: Hugging Face checkpoints with any number of KV heads, and Meta's official format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmpruner import hookimpl

from .commands import add_commands
from .exporter import MetaExporter
from .family import LlamaFamily
from .meta_reader import MetaReader

if TYPE_CHECKING:
    import typer

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


@hookimpl
def llmpruner_commands(app: typer.Typer) -> None:
    add_commands(app)
