"""Token ids of a text that may have no blanks: tokenizers take a run of characters without a blank as one word, and
their time grows with the square of its length."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

LONGEST_WORD = 2000
"""Characters without a blank that are encoded at once. Words are shorter, and so are most paragraphs in scripts without
blanks."""
_WORD = re.compile(r"\S+")


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """The token ids of ``text``, without special tokens. Text is encoded as one string, but for runs of more than
    `LONGEST_WORD` characters without a blank, which are cut at every so many."""
    ids: list[int] = []
    for piece in _pieces(text):
        ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def ids_to_continue(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """The token ids of a text that goes on, such as a prompt. ``special``: with what the tokenizer puts before a text,
    without an end-of-sequence token that it puts after each (``add_eos_token``)."""
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    eos = tokenizer.eos_token_id
    if special and eos is not None and len(ids) > 1 and ids[-1] == eos:
        own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if _at_end(ids, eos) > _at_end(own, eos):
            ids.pop()
    return ids


def _at_end(ids: Sequence[int], token: int) -> int:
    """How many of the last tokens are ``token``."""
    return sum(1 for _ in takewhile(lambda one: one == token, reversed(ids)))


def _pieces(text: str) -> Iterator[str]:
    start = 0
    for word in _WORD.finditer(text) if len(text) > LONGEST_WORD else ():
        for stop in range(word.start() + LONGEST_WORD, word.end(), LONGEST_WORD):
            yield text[start:stop]
            start = stop
    if start < len(text) or not text:
        yield text[start:]
