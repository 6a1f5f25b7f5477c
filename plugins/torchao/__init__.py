"""torchao: weights in 8 or 4 bits."""

from __future__ import annotations

from llmpruner import hookimpl

from .exporter import TorchAoExporter

__all__ = ["TorchAoExporter"]


@hookimpl
def llmpruner_exporters() -> list[type]:
    return [TorchAoExporter]
