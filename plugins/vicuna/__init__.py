"""Vicuna: LLaMA with a conversation format, and delta weights."""

from __future__ import annotations

from llmpruner import hookimpl

from .family import VicunaFamily, VicunaV0Family

__all__ = ["VicunaFamily", "VicunaV0Family"]


@hookimpl
def llmpruner_model_families() -> list[type]:
    return [VicunaFamily, VicunaV0Family]
