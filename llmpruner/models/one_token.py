"""Attention of one new token to the cached ones, on CPUs.

The kernel that torch has for it there is made for many queries at once: with one query in each of many sequences, two
matrix products take less time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "sdpa"


@contextmanager
def fast_one_token_attention() -> Iterator[None]:
    """While active, models with the attention ``sdpa`` on a CPU compute that of a single query in each sequence, to all
    of the keys, by matrix products. Results are those of ``sdpa`` up to rounding."""
    own: Any = ALL_ATTENTION_FUNCTIONS[_NAME]

    def attend(
        module: Any,
        query_BHQD: torch.Tensor,
        key_BGTD: torch.Tensor,
        value_BGTE: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        batch, heads, queries, dim = query_BHQD.shape
        # Masks of one query are left out by transformers where it attends to all tokens.
        if queries > 1 or attention_mask is not None or query_BHQD.device.type != "cpu" or _has_more(dropout, options):
            found: tuple[torch.Tensor, None] = own(
                module, query_BHQD, key_BGTD, value_BGTE, attention_mask, dropout=dropout, scaling=scaling, **options
            )
            return found
        # The query heads of a group, which share keys and values, are the rows of one product.
        groups = key_BGTD.shape[1]
        scale = dim**-0.5 if scaling is None else scaling
        # In float32, as oneDNN, which multiplies bfloat16, keeps code of its own for every number of cached tokens.
        with torch.autocast("cpu", enabled=False):
            rows_BGRD = scale * query_BHQD.float().reshape(batch, groups, heads // groups, dim)
            weights_BGRT = (rows_BGRD @ key_BGTD.float().transpose(-1, -2)).softmax(-1)
            attended_BGRE = weights_BGRT @ value_BGTE.float()
        # As many sequences as have keys, also where their queries are the same.
        return attended_BGRE.reshape(len(attended_BGRE), 1, heads, -1).to(value_BGTE.dtype), None

    ALL_ATTENTION_FUNCTIONS[_NAME] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[_NAME] = own


def _has_more(dropout: float, options: dict[str, Any]) -> bool:
    """Whether something else than scaled products is asked for: a bias of positions, soft caps, weights as a result."""
    return bool(dropout) or any(
        options.get(name) is not None and options[name] is not False
        for name in ("position_bias", "softcap", "output_attentions")
    )
