"""How many tokens a model reads, and logits of some positions alone."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_LOG = logging.getLogger("llmpruner")


def positions_of(config: PreTrainedConfig) -> int | None:
    """The number of positions of the text model; None where its configuration sets no limit."""
    text = config.get_text_config()
    # MPT's configuration has the second name.
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def table_of(config: PreTrainedConfig) -> int | None:
    """`positions_of` a model that looks them up in a table (GPT-2, OPT), and reads no more; None for a rotary one."""
    rotary = getattr(config.get_text_config(), "rope_parameters", None)
    return None if rotary else positions_of(config)


def check_table(config: PreTrainedConfig, tokens: int, what: str, advice: str, ref: str) -> None:
    """Raise `DataError` for more ``tokens`` (``what``: named) than a table has positions, with ``advice``."""
    limit = table_of(config)
    if limit is not None and tokens > limit:
        raise DataError(f"{what} are beyond the {limit:,} positions of {ref}; {advice}")


def warn_beyond(config: PreTrainedConfig, tokens: int, what: str, advice: str, ref: str) -> None:
    """Warn of more tokens than a rotary model was trained with: its predictions get worse."""
    limit = positions_of(config)
    if limit is not None and tokens > limit:
        _LOG.warning("%s are beyond the %s positions that %s was trained with; %s", what, f"{limit:,}", ref, advice)


LOGIT_ELEMENTS = 1 << 24
"""Logits that are computed at once, if the model can: 64 MiB in float32."""


def computes_some_logits(model: PreTrainedModel) -> bool:
    """Whether the model's forward takes ``logits_to_keep``, as nearly all of transformers' do."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def last_logits(model: PreTrainedModel) -> dict[str, Any]:
    """The arguments by which a forward computes the logits of the last position alone; none where it cannot."""
    return {"logits_to_keep": 1} if computes_some_logits(model) else {}


def logits_at(model: PreTrainedModel, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits (B, n, V) of token ids (B, T) at ``positions`` (n,), int64; computes no others if the model can."""
    if computes_some_logits(model):
        logits: torch.Tensor = model(input_ids=input_ids, use_cache=False, logits_to_keep=positions).logits
        return logits
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
