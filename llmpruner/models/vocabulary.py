"""Token ids that a model has no embedding for."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import DataError


def check_ids(ids: torch.Tensor, model: Any) -> torch.Tensor:
    """``ids``, once it is sure that ``model`` can read them. Raises `DataError` for a tokenizer of another model."""
    if not ids.numel():
        return ids
    rows = int(model.get_input_embeddings().weight.shape[0])
    largest = int(ids.max())
    if largest >= rows:
        raise DataError(
            f"the tokenizer gives token {largest}, and the model has {rows} embeddings: it is that of another model"
        )
    return ids
