"""Whether the predictions of two models can be compared token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ModelError

if TYPE_CHECKING:
    from .base import ComparedModel

_WHY = "KL divergence needs one vocabulary; compare models with the same tokenizer, or leave kl out"


def check_one_vocabulary(first: ComparedModel, other: ComparedModel) -> None:
    """Raise `ModelError` for two models whose configurations have vocabularies of different sizes."""
    one, two = (getattr(model.config.get_text_config(), "vocab_size", None) for model in (first, other))
    if one is not None and two is not None and one != two:
        raise ModelError(f"'{other.name}' predicts {two:,} tokens and '{first.name}' {one:,}; {_WHY}")


def check_same_tokens(first: ComparedModel, other: ComparedModel, ids: Sequence[Sequence[int]]) -> None:
    """Raise `ModelError` where the tokenizers give other tokens. ``ids``: of the same text, by that of ``first`` and by
    that of ``other``, whose tokens both models would be given.

    Different ids are right where they mean the same tokens: a fast and a slow tokenizer of one vocabulary do not agree
    on every text.
    """
    mine, read = (list(one) for one in ids)
    if mine == read:
        return
    meant = [model.tokenizer.convert_ids_to_tokens(sorted(set(read))) for model in (first, other)]
    if meant[0] != meant[1]:
        raise ModelError(f"the tokenizers of '{first.name}' and '{other.name}' give other tokens for a text; {_WHY}")
