"""How many tokens a model can read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def positions_of(config: PreTrainedConfig) -> int | None:
    """The number of positions of the text model; None where its configuration sets no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
