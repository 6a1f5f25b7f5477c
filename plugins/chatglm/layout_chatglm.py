"""Attention mask and positions of ChatGLM-6B. Imports torch alone: it is copied into checkpoints.

A sequence is ``context… <sop> answer…``. Attention is bidirectional in the context and causal in the answer. Every
token has two positions: that in the context, which is that of ``[gMASK]`` (else ``[MASK]``) from ``<sop>`` on, and that
in the answer, which is 0 in the context and counts from 1 at ``<sop>``.
Shapes: B batch, T new tokens, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .configuration_chatglm import ChatGLMConfig


@dataclass(frozen=True)
class Layout:
    """The columns of the parts of every row; each tensor is ``[B]``.

    ``start``: first token that is not padding. ``sop``: the ``<sop>`` token. ``mask``: the position of ``[gMASK]``,
    counted from ``start``. A row without ``<sop>`` is the continuation of an empty context, with causal attention, so
    that the likelihood of plain text is valid.
    """

    start: torch.Tensor
    sop: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: ChatGLMConfig) -> Layout:
        """``input_ids`` ``[B, T]`` of whole sequences; ``attention_mask`` ``[B, T]``, 0 on padding, or None."""
        start = torch.zeros_like(input_ids[:, 0])
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, -1)
            start = _first(attention_mask != 0, otherwise=start)
        sop = _first(input_ids == config.bos_token_id, otherwise=start)
        mask = _first(input_ids == config.mask_token_id, otherwise=start)
        mask = _first(input_ids == config.gmask_token_id, otherwise=mask)
        return cls(start, sop, mask - start)

    @classmethod
    def without_context(cls, batch: int, device: torch.device) -> Layout:
        zero = torch.zeros(batch, dtype=torch.long, device=device)
        return cls(zero, zero, zero)

    def position_ids(self, columns: torch.Tensor) -> torch.Tensor:
        """``columns`` ``[T]`` → ``[B, 2, T]``: position in the context, position in the answer."""
        sop = self.sop[:, None]
        in_context = columns < sop
        position = torch.where(in_context, columns - self.start[:, None], self.mask[:, None])
        block = torch.where(in_context, 0, columns - sop + 1)
        return torch.stack((position, block), dim=1).clamp_min(0)

    def visible(
        self, queries: torch.Tensor, keys: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Columns ``[T]`` of queries and ``[S]`` of keys → bool ``[B, 1, T, S]``, True where a query may attend.

        Queries of padding attend to all keys, so that no attention function divides by zero; no other attends to them.
        """
        causal = keys[None, None, None, :] <= queries[None, None, :, None]
        visible = causal | (keys < self.sop[:, None])[:, None, None, :]
        if attention_mask is not None:
            real = nn.functional.pad(attention_mask != 0, (0, keys.shape[0] - attention_mask.shape[1]), value=False)
            visible = visible & real[:, None, None, :]
        return visible | ~visible.any(-1, keepdim=True)


def _first(found: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Column of the first True of every row, ``otherwise`` where there is none."""
    return torch.where(found.any(-1), found.int().argmax(-1), otherwise)
