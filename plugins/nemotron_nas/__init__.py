"""Nemotron-NAS: LLaMA with a width of its own for every layer, as vLLM, SGLang and mlx-lm read it."""

from __future__ import annotations

from llmpruner import hookimpl


@hookimpl
def llmpruner_exporters() -> list[type]:
    from .exporter import NemotronNasExporter

    return [NemotronNasExporter]
