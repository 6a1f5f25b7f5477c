"""Gram matrices XᵀX summed over tokens. They are symmetric, so only about half of the products are computed."""

from __future__ import annotations

import torch

_BLOCKS = 4
"""Column blocks that a Gram matrix is computed in; more blocks save little more."""


def add_gram(lower_II: torch.Tensor, inputs_NI: torch.Tensor) -> None:
    """Add XᵀX of ``inputs_NI`` (tokens, d_in) to the lower triangle of ``lower_II`` (d_in, d_in), in place. Elements
    above the diagonal are left undefined; `both_triangles` fills them in."""
    width = inputs_NI.shape[1]
    step = max(1, -(-width // _BLOCKS))
    for start in range(0, width, step):
        end = min(start + step, width)
        lower_II[start:, start:end].addmm_(inputs_NI[:, start:].T, inputs_NI[:, start:end])


def both_triangles(lower: torch.Tensor) -> torch.Tensor:
    """Symmetric matrices (…, d_in, d_in) from their lower triangles."""
    return lower.tril() + lower.tril(-1).mT
