"""ShareGPT conversations as training text, with the loss on what the assistant says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmpruner import read_sharegpt

from .conversation import V0_TRAINING, V1_1, Template, Turn

IGNORED = -100


@dataclass(frozen=True, slots=True)
class TrainingText:
    """``spans``: character ranges [start, end) that are trained on, increasing and apart from each other."""

    text: str
    spans: tuple[tuple[int, int], ...]


def read_turns(record: Mapping[str, Any], *, keep_leading_answer: bool = False) -> list[Turn]:
    """The turns of ``{"id": …, "conversations": [{"from": "human" or "gpt", "value": …}, …]}``.

    A turn before the first question is dropped, as Vicuna v1.1 was trained. Raises `DataError` when the record has
    another form, or the two sides do not take turns.
    """
    where = f"conversation {record.get('id', '')!r}"
    turns = read_sharegpt(record.get("conversations"), where, keep_leading_answer=keep_leading_answer)
    return [Turn(*turn) for turn in turns]


def training_text(turns: Sequence[Turn], template: Template = V1_1) -> TrainingText:
    """The loss is on the assistant's text alone, from the blank before it to what closes it."""
    return _spans(template, turns, [piece.answer for piece in template.pieces(turns)])


def first_training_text(turns: Sequence[Turn]) -> TrainingText:
    """How the weights v0 were trained (FastChat f34f28c): the loss is on all but the human's sentences, so on
    the header too."""
    return _spans(V0_TRAINING, turns, [piece.speaker != "human" for piece in V0_TRAINING.pieces(turns)])


def _spans(template: Template, turns: Sequence[Turn], supervised: Sequence[bool]) -> TrainingText:
    text = ""
    spans: list[tuple[int, int]] = []
    for piece, trained in zip(template.pieces(turns), supervised, strict=True):
        start, text = len(text), text + piece.text
        if trained and spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], len(text))
        elif trained:
            spans.append((start, len(text)))
    return TrainingText(text, tuple(spans))


def encode(
    tokenizer: Any, training: TrainingText, max_length: int | None = None, *, supervise_bos: bool = False
) -> tuple[list[int], list[int]]:
    """``input_ids`` and ``labels`` (−100: ignored), at most ``max_length`` long.

    The text is tokenised as a whole, as it is when the model is used, and a token is trained on when it has a
    character of a span. ``supervise_bos``: as FastChat 00d9e667 did. The tokenizer must give offsets.
    """
    encoded = tokenizer(training.text, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    labels = [
        token if any(start < b and a < end for a, b in training.spans) else IGNORED
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    if supervise_bos and ids[:1] == [tokenizer.bos_token_id]:
        labels[0] = ids[0]
    return ids[:max_length], labels[:max_length]
