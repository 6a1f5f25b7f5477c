"""torchao: weights in 8 or 4 bits."""

from __future__ import annotations

from llmpruner import hookimpl


@hookimpl
def llmpruner_exporters() -> list[type]:
    from .exporter import TorchAoExporter

    return [TorchAoExporter]
