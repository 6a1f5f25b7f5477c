"""Vicuna: LLaMA with a conversation format."""

from __future__ import annotations

from llmpruner import hookimpl

from .family import VicunaFamily


@hookimpl
def llmpruner_model_families() -> list[type]:
    return [VicunaFamily]
