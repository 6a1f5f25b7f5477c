"""Conversations in the form of ShareGPT, as Vicuna was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Literal

from ..errors import DataError

Speaker = Literal["human", "gpt"]

_SPEAKERS: dict[str, Speaker] = {"human": "human", "user": "human", "gpt": "gpt", "chatgpt": "gpt", "assistant": "gpt"}


def read_sharegpt(sentences: Any, where: str, *, keep_leading_answer: bool = False) -> list[tuple[Speaker, str]]:
    """The turns of ``[{"from": "human" or "gpt", "value": text}, …]``, as (speaker, text).

    A turn before the first question is dropped. ``where`` is the place for error messages. Raises `DataError` when
    the form is another one, nobody answers, or the two sides do not take turns.
    """
    if not isinstance(sentences, list) or not sentences:
        raise DataError(f"{where}: 'conversations' must be a list of {{'from', 'value'}}")
    turns = [_turn(sentence, where) for sentence in sentences]
    if turns[0][0] != "human" and not keep_leading_answer:
        turns = turns[1:]
        if turns and turns[0][0] != "human":
            raise DataError(f"{where}: two answers stand before the first question; expected taking turns")
    if all(speaker != "gpt" for speaker, _ in turns):
        raise DataError(f"{where}: nobody answers; expected turns of 'human' and 'gpt'")
    for number, ((one, _), (other, _)) in enumerate(pairwise(turns), start=2):
        if one == other:
            raise DataError(f"{where}: '{one}' speaks twice in a row (turn {number}); expected taking turns")
    return turns


def exchanges(turns: Iterable[tuple[Speaker, str]]) -> list[tuple[str, str]]:
    """Questions with their answers; a question at the end that nobody answered is left out."""
    pairs = []
    question = ""
    for speaker, text in turns:
        if speaker == "human":
            question = text
        else:
            pairs.append((question, text))
    return pairs


def _turn(sentence: Any, where: str) -> tuple[Speaker, str]:
    value, speaker = (sentence.get("value"), sentence.get("from")) if isinstance(sentence, dict) else (None, None)
    if not isinstance(value, str) or not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise DataError(f"{where}: a turn is {{'from': 'human' or 'gpt', 'value': text}}, found from {speaker!r}")
    return _SPEAKERS[speaker], value
