"""Automatic discovery of a model's coupled structure; `discovery.verify` is the oracle that proves it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {"discover_graph": "groups", "discover_groups": "groups"}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'llmpruner.discovery' has no attribute '{name}'")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
