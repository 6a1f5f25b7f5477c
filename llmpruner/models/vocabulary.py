"""The tokens that a model reads and predicts."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import DataError, ModelError


def predicted_tokens(model: Any) -> int:
    """How many tokens a model predicts. Reads no weights."""
    # Some classes do not say what their head is; it has as many tokens as the embeddings.
    head = model.get_output_embeddings() or model.get_input_embeddings()
    return int(head.weight.shape[0])


def check_one_head(reference: Any, model: Any) -> None:
    """Raise `ModelError` for models that predict different numbers of tokens: one cannot read what the other can, and
    their predictions are not of the same tokens."""
    wanted, found = predicted_tokens(reference), predicted_tokens(model)
    if wanted != found:
        raise ModelError(
            f"the model predicts {found} tokens and the reference {wanted}; KL divergence needs one vocabulary"
        )


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
