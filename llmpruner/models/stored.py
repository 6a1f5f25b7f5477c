"""Tensors as they are stored: quantised ones consist of several."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def stored_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold ``tensor``: of a quantised one, its integers, scales and zero points; else itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from stored_parts(getattr(tensor, name))


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes that ``tensor`` takes, of a quantised one with its scales."""
    return sum(part.numel() * part.element_size() for part in stored_parts(tensor))
