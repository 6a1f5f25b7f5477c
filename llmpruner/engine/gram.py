"""Gram matrices XᵀX, summed up over tokens: symmetric, so only about half of the products are computed."""

from __future__ import annotations

import torch

_BLOCKS = 4
"""More of them save little more."""


def add_gram(lower_II: torch.Tensor, inputs_NI: torch.Tensor) -> None:
    """Add XᵀX to the lower triangle of ``lower_II``; what stands above it means nothing until `both_triangles`."""
    width = inputs_NI.shape[1]
    step = max(1, -(-width // _BLOCKS))
    for start in range(0, width, step):
        end = min(start + step, width)
        lower_II[start:, start:end].addmm_(inputs_NI[:, start:].T, inputs_NI[:, start:end])


def both_triangles(lower: torch.Tensor) -> torch.Tensor:
    """The whole of symmetric matrices (…, in, in) of which only the lower triangle is known."""
    return lower.tril() + lower.tril(-1).mT
