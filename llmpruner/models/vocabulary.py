"""The tokens that a model reads and predicts."""

from __future__ import annotations

import copy
from collections.abc import Iterable
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


def embedding_rows(model: Any) -> int:
    """How many tokens a model reads. Reads no weights."""
    return int(model.get_input_embeddings().weight.shape[0])


def padding_id(tokenizer: Any, model: Any, others: Iterable[int | None] = ()) -> int:
    """A token for padding, which is masked, but looked up in the embeddings all the same: the tokenizer's, if ``model``
    can read it, which it cannot where one was added to the tokenizer alone; else one of ``others``, the end of the
    sequence, or 0."""
    rows = embedding_rows(model)
    found = (tokenizer.pad_token_id, *others, tokenizer.eos_token_id, 0)
    return next(int(token) for token in found if token is not None and 0 <= token < rows)


def with_padding(tokenizer: Any, model: Any) -> Any:
    """``tokenizer`` with `padding_id` as its padding token; a copy where that is another one, as the tokenizer is saved
    with the model."""
    token = padding_id(tokenizer, model)
    if token == tokenizer.pad_token_id:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token)
    return tokenizer


def check_ids(ids: torch.Tensor, model: Any) -> torch.Tensor:
    """``ids``, once it is sure that ``model`` can read them. Raises `DataError` for a tokenizer of another model."""
    if not ids.numel():
        return ids
    rows = embedding_rows(model)
    largest = int(ids.max())
    if largest >= rows:
        raise DataError(
            f"the tokenizer gives token {largest}, and the model has {rows} embeddings: it is that of another model"
        )
    return ids
