"""Tokens of a text in a chat format, with those of its answers marked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..models.tokenizer import ids_to_continue
from .chat import TrainingText, common_start

if TYPE_CHECKING:
    from ..settings import LossOn

IGNORED = -100
"""The label of tokens that have no loss (the convention of PyTorch's cross entropy and of transformers)."""


def labelled(text: TrainingText, tokenizer: Any, cutoff: int | None, loss_on: LossOn) -> dict[str, list[int]]:
    """``input_ids`` and ``labels`` of the first ``cutoff`` tokens of ``text``, None: of all. A label is its token; with
    ``loss_on="answers"``, `IGNORED` for tokens that have no character of an answer."""
    whole = text.has_special_tokens or (len(text.turns) > 1 and tokenizer.is_fast)
    ids, answered = (_encode_whole if whole else _encode_turns)(text, tokenizer)
    labels = [token if loss_on == "all" or yes else IGNORED for token, yes in zip(ids, answered, strict=True)]
    return {"input_ids": ids[:cutoff], "labels": labels[:cutoff]}


def _encode_turns(text: TrainingText, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokenised turn by turn: the token ids, and for each whether it belongs to an answer. A token with characters of
    prompt and answer belongs to the answer, as the model has to generate it."""
    ids: list[int] = []
    answered: list[bool] = []
    for number, turn in enumerate(text.turns):
        prompt = _ids(tokenizer, turn.prompt, special=number == 0) if turn.prompt else []
        piece = _ids(tokenizer, turn.prompt + turn.answer, special=number == 0)
        start = common_start(prompt, piece)
        ends = text.ends(number) and tokenizer.eos_token_id is not None
        if ends and piece[-1:] != [tokenizer.eos_token_id]:
            piece.append(tokenizer.eos_token_id)
        ids += piece
        answered += [index >= start for index in range(len(piece))]
    return ids, answered


def _encode_whole(text: TrainingText, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """As `_encode_turns`, but tokenised as one text, because some tokenizers treat the start of a text differently from
    text after a special token."""
    special = not text.has_special_tokens
    joined = ""
    answers: list[tuple[int, int]] = []
    for turn in text.closed_turns(tokenizer.eos_token or ""):
        piece = turn.prompt + turn.answer
        answers.append((len(joined) + len(turn.prompt), len(joined) + len(piece)))
        joined += piece
    if not tokenizer.is_fast:
        ids = _ids(tokenizer, joined, special=special)
        spans = [
            tuple(common_start(_ids(tokenizer, joined[:n], special=special), ids) for n in ends) for ends in answers
        ]
        return ids, [any(start <= index < end for start, end in spans) for index in range(len(ids))]
    encoded = tokenizer(joined, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids = _ids(tokenizer, joined, special=special)
    offsets = encoded["offset_mapping"][: len(ids)]
    return ids, [any(a < end and start < b for start, end in answers) for a, b in offsets]


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    return ids_to_continue(tokenizer, text, special=special)
