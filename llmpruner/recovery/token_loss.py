"""A loss of logits as a mean over tokens, computed for a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Term = Callable[[torch.Tensor, slice], torch.Tensor]
"""Of logits (n, V), float32, of the tokens in a slice of all N tokens: their losses, (n,)."""

_ELEMENTS = 1 << 22
"""Logits of a block, 16 MiB in float32: what the loss needs beside them stays in the processor's caches, and in memory
that the C library hands out again."""


def mean_over_tokens(logits_BTV: torch.Tensor, rows_N: torch.Tensor, term: Term) -> torch.Tensor:
    """Mean of ``term`` over the tokens at ``rows_N``, which are numbers of rows of the logits flattened to (B·T, V): a
    scalar in float32, 0 for no rows.

    The gradient is computed along with the loss, block by block, so that beside the logits there is only one tensor of
    their size; the losses of a vocabulary's logits would otherwise take several, and their reading and writing more
    time than a small model's own computation. Only ``logits_BTV`` gets a gradient, once.
    """
    flat = logits_BTV.flatten(0, -2)
    compute: Any = _MeanOverTokens.apply  # torch types it in some versions
    mean: torch.Tensor = compute(flat, rows_N, term)
    return mean


def blocks(count: int, vocabulary: int) -> list[slice]:
    """Slices of ``count`` tokens."""
    size = max(1, _ELEMENTS // vocabulary)
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


class _MeanOverTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, rows: torch.Tensor, term: Term) -> torch.Tensor:
        count, needed = len(rows), ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        gradient = torch.zeros_like(logits) if needed else None
        # The precision of the loss is float32 wherever it is called.
        with torch.autocast(logits.device.type, enabled=False):
            for part in blocks(count, logits.shape[-1]):
                block = logits.index_select(0, rows[part]).float().requires_grad_(needed)
                with torch.set_grad_enabled(needed):
                    loss = term(block, part).sum()
                total += loss.detach()
                if gradient is not None:
                    (of_block,) = torch.autograd.grad(loss, block)
                    gradient.index_copy_(0, rows[part], of_block.div_(count).to(gradient.dtype))
        ctx.gradient = gradient
        return (total / max(count, 1)).float()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(upstream[0]), None, None
