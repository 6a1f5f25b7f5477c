"""Whether a text was read in calibration: short fingerprints of passages, which take little room in a record.

A passage is a run of 13 words, the length by which GPT-3 (Brown et al., 2020, appendix C) compared training and test
data. Of all passages of a text, those are kept whose hash is divisible by a fixed number, so that two texts with equal
passages keep equal ones, wherever they stand and however the texts are divided into samples.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator

WORDS = 13
_ONE_OF = 32
"""One passage in so many is kept."""
_FEWEST = 5
"""Fewest kept passages of a text by which its overlap is measured."""
_WORD = re.compile(r"\w+")


def passages_of(texts: Iterable[str]) -> list[str]:
    """Fingerprints (12 hexadecimal digits) of one in 32 passages of ``texts``, sorted, each once."""
    return sorted({found for text in texts for found in _kept(text)})


def overlap(text: str, passages: Collection[str]) -> float | None:
    """The share of the passages of ``text`` that are among ``passages``, by the fingerprints that `passages_of` keeps.
    None for a text with too few of them."""
    found = list(_kept(text))
    if len(found) < _FEWEST:
        return None
    known = frozenset(passages)
    return sum(one in known for one in found) / len(found)


def _kept(text: str) -> Iterator[str]:
    words = _WORD.findall(text.lower())
    for start in range(len(words) - WORDS + 1):
        digest = hashlib.blake2b(" ".join(words[start : start + WORDS]).encode(), digest_size=6)
        if digest.digest()[-1] % _ONE_OF == 0:
            yield digest.hexdigest()
