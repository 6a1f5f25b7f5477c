"""Logits of some positions alone, so that those of a whole text need not be in memory at once."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGIT_ELEMENTS = 1 << 24
"""Logits that are computed at once, if the model can: 64 MiB in float32."""


def computes_some_logits(model: PreTrainedModel) -> bool:
    """Whether the model's forward takes ``logits_to_keep``, as nearly all of transformers' do."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def last_logits(model: PreTrainedModel) -> dict[str, Any]:
    """The arguments by which a forward computes the logits of the last position alone; none where it cannot."""
    return {"logits_to_keep": 1} if computes_some_logits(model) else {}


def logits_at(model: PreTrainedModel, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits (B, n, V) of token ids (B, T) at ``positions`` (n,), int64. A model that `computes_some_logits` computes
    no others."""
    if computes_some_logits(model):
        found: torch.Tensor = model(input_ids=input_ids, use_cache=False, logits_to_keep=positions).logits
        return found
    every: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return every.index_select(1, positions)


def position_blocks(model: PreTrainedModel, input_ids: torch.Tensor, vocabulary: int) -> list[torch.Tensor]:
    """The positions of token ids (B, T) that predict a token, 0 to T - 2, in blocks of at most `LOGIT_ELEMENTS` logits
    and at least one position; in one block for a model that computes the logits of all positions anyway."""
    samples, length = input_ids.shape
    positions = torch.arange(length - 1, device=input_ids.device)
    if not computes_some_logits(model):
        return [positions]
    return list(torch.split(positions, max(1, LOGIT_ELEMENTS // (samples * vocabulary))))
