"""How the scores of a group's units are distributed, in few numbers. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import isfinite, log10
from typing import TypedDict

BINS = 20
_WIDE = 10
"""From this ratio of the largest score to the smallest on, bins are of equal width in the logarithm."""


class Spread(TypedDict):
    """Histogram of scores. ``low``, ``high``: of the first and the last of the bins of equal width; ``log``: whether
    that is the width in the logarithm of the scores. ``kept``, ``removed``: units in each bin."""

    low: float
    high: float
    log: bool
    kept: list[int]
    removed: list[int]


def spread(scores: Sequence[float], kept: Collection[int]) -> Spread:
    """The `Spread` of ``scores``, one for each unit. ``kept``: numbers of the units that stay. Scores that are not
    finite (units that must stay) are left out."""
    known = {unit: score for unit, score in enumerate(scores) if isfinite(score)}
    low, high = min(known.values(), default=0.0), max(known.values(), default=0.0)
    wide = low > 0 and high >= _WIDE * low
    first, last = (log10(low), log10(high)) if wide else (low, high)
    found = Spread(low=low, high=high, log=wide, kept=[0] * BINS, removed=[0] * BINS)
    stays = set(kept)
    for unit, score in known.items():
        place = ((log10(score) if wide else score) - first) / (last - first) if last > first else 0.0
        found["kept" if unit in stays else "removed"][min(int(place * BINS), BINS - 1)] += 1
    return found
