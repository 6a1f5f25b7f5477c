"""Windows of tokens from documents, and what a tokenizer puts before every text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DataError
from ..models.tokenizer import LONGEST_WORD, tokens_of

if TYPE_CHECKING:
    from .base import SampleTask

_CHARACTERS_PER_TOKEN = 12  # more than the average in any language, so that a piece of text has enough tokens


def windows(documents: Sequence[str], task: SampleTask) -> torch.Tensor:
    """Token ids, int64 (samples, length): windows that do not overlap, from as many different pieces of the text as
    possible; where there are too few, at random positions. Documents are joined in random order. Raises `DataError`."""
    samples, tokenizer, opening = task.samples, task.tokenizer, opening_tokens(task.tokenizer, documents[0])
    length = task.length - len(opening)
    if length < 1:
        room = f"no room for text after the {len(opening)} that the tokenizer puts first"
        raise DataError(f"a sample of {task.length} tokens has {room}; raise --set prune.length")
    rng = random.Random(task.seed)
    text = "\n\n".join(rng.sample(documents, len(documents)))
    of_pieces: list[list[list[int]]] = []
    for piece in _pieces(text, 8 * length * _CHARACTERS_PER_TOKEN, rng)[:samples]:
        ids = tokens_of(tokenizer, piece)
        starts = [number * length for number in range(len(ids) // length)]
        rng.shuffle(starts)
        of_pieces.append([ids[start : start + length] for start in starts])
    # One window of every piece, then the next one of every piece that has more.
    rows = [row for turn in zip_longest(*of_pieces) for row in turn if row is not None][:samples]
    rows += _anywhere(text, tokenizer, samples - len(rows), length, rng)
    if len(rows) < samples:
        wanted = f"{samples} samples of {task.length} tokens"
        raise DataError(f"'{task.reference}' is too short for {wanted}; lower --samples or --set prune.length")
    return torch.tensor([[*opening, *row] for row in rows], dtype=torch.long)


def _pieces(text: str, size: int, rng: random.Random) -> list[str]:
    """The text in pieces of about ``size`` characters, which start at a word, in random order."""
    pieces: list[str] = []
    start, stop = 0, rng.randrange(1, size + 1) if len(text) > size else size
    while start < len(text):
        stop = _word_end(text, stop)
        pieces.append(text[start:stop])
        start, stop = stop, stop + size
    rng.shuffle(pieces)
    return pieces


def _word_end(text: str, start: int) -> int:
    """The first position from ``start`` on that follows a blank; ``start`` where there is none near, as in Chinese."""
    for position in range(start, min(len(text), start + LONGEST_WORD)):
        if text[position - 1].isspace():
            return position
    return start if len(text) > start + LONGEST_WORD else len(text)


def _anywhere(text: str, tokenizer: Any, samples: int, length: int, rng: random.Random) -> list[list[int]]:
    """Windows of ``length`` tokens at random positions; fewer than ``samples`` if the text is too short."""
    span = length * _CHARACTERS_PER_TOKEN
    rows: list[list[int]] = []
    failed = 0
    while len(rows) < samples and failed < 200:
        start = rng.randrange(max(1, len(text) - span + 1))
        start = _word_end(text, start) if start else 0
        ids = tokens_of(tokenizer, text[start : start + span])[:length]
        failed = 0 if len(ids) == length else failed + 1
        if not failed:
            rows.append(ids)
    return rows


def opening_tokens(tokenizer: Any, text: str) -> list[int]:
    """What ``tokenizer`` puts before ``text``; ``bos_token`` does not tell (GPT-2 has one and puts none)."""
    start = text[:256]
    plain, own = (tokenizer(start, add_special_tokens=s, verbose=False)["input_ids"] for s in (False, True))
    starts = (start for start in range(len(own) - len(plain) + 1) if own[start : start + len(plain)] == plain)
    return list(own[: next(starts, 0)]) if plain else []
