"""Several sources of records as one: ``a.jsonl,b.jsonl``, or with shares ``3*a.jsonl,1*b.jsonl``."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from os.path import isfile
from typing import NamedTuple, TypeVar

from ..errors import DataError

T = TypeVar("T")

_PART = re.compile(r"(?:(\d+(?:\.\d+)?)\*)?(.+)", re.S)


class Part(NamedTuple):
    """One source. ``share``: how many of its records are taken in proportion to the others'; None where no source has
    a share, and all records are taken."""

    source: str
    share: float | None = None


def parse_mixture(text: str) -> tuple[Part, ...]:
    """The sources that ``text`` names. A file that exists is one source, whatever its name.

    Raises `DataError` for an empty name and a share of zero.
    """
    return (Part(text),) if isfile(text) else split_mixture(text)


def split_mixture(text: str) -> tuple[Part, ...]:
    """`parse_mixture` of what is no file."""
    parts = []
    for piece in text.split(","):
        match = _PART.fullmatch(piece.strip())
        if match is None:
            raise DataError(f"'{text}' has a source with an empty name; expected SOURCE,SOURCE or 3*SOURCE,1*SOURCE")
        share = None if match[1] is None else float(match[1])
        if share == 0:
            raise DataError(f"'{text}': a share of 0 takes nothing of '{match[2]}'; leave it out")
        parts.append(Part(match[2], share))
    if any(part.share is not None for part in parts):
        parts = [Part(part.source, 1.0 if part.share is None else part.share) for part in parts]
    return tuple(parts)


def mixed(parts: Sequence[tuple[Part, Sequence[T]]], seed: int) -> list[T]:
    """The records of all sources, those of each together, in their order. With shares, as many as there can be in these
    proportions, drawn at random by ``seed``."""
    unit = min((len(records) / part.share for part, records in parts if part.share), default=0.0)
    chosen: list[T] = []
    for number, (part, records) in enumerate(parts):
        count = len(records) if part.share is None else max(1, round(part.share * unit))
        places = sorted(random.Random(f"{seed} {number}").sample(range(len(records)), min(count, len(records))))
        chosen += [records[place] for place in places]
    return chosen
