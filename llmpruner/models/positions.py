"""How many tokens a model can read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ..errors import LlmprunerError
from .empty import REFUSALS, meta_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FIXED = "max_seq_len"
"""MPT's configuration has this name alone, and its code adds slopes for so many positions, no more."""


def positions_of(config: PreTrainedConfig) -> int | None:
    """The number of positions of the text model; None where its configuration sets no limit."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, FIXED, None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if getattr(text, "pad_token_id", None) is None or getattr(text, "rope_parameters", None):
        return limit
    return limit - _unused_rows(config, limit)


def _unused_rows(config: PreTrainedConfig, rows: int) -> int:
    """How many of so many rows of a table of positions are before the first one: RoBERTa counts from the number of the
    padding token on, which the table has too."""
    try:
        model = meta_model(config)
        tokens = model.get_input_embeddings()
    except (LlmprunerError, *REFUSALS):
        return 0  # opening the model says what is wrong
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    found = (table.padding_idx for table in tables if table.num_embeddings == rows)
    return max((number + 1 for number in found if number is not None), default=0)
