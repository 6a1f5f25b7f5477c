"""One progress bar for work that consists of pieces of different size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from ..progress import Progress

T = TypeVar("T")


class Pieces:
    """Shares of one bar. ``at``: as `Progress.bar` yields it; ``total``: the sum of the sizes of all pieces."""

    def __init__(self, at: Callable[[float, str], None], total: float, outer: Progress) -> None:
        self._at, self._total, self._outer = at, total, outer
        self._done = 0.0

    @contextmanager
    def piece(self, label: str, size: float) -> Iterator[Progress]:
        """Yields what the piece reports its progress to."""
        self._at(self._done / self._total, label)

        def report(share: float) -> None:
            self._at((self._done + size * min(share, 1.0)) / self._total, label)

        yield _Piece(report, self._outer)
        self._done += size
        self._at(self._done / self._total, label)


class _Piece(Progress):
    """Reports to a part of the bar; of several passes over items, the furthest counts."""

    def __init__(self, report: Callable[[float], None], outer: Progress) -> None:
        self._report, self._outer, self._share = report, outer, 0.0

    def _reach(self, share: float) -> None:
        self._share = max(self._share, share)
        self._report(self._share)

    def track(self, items: Sequence[T], label: str) -> Iterable[T]:
        del label
        for number, item in enumerate(items, start=1):
            yield item
            self._reach(number / len(items))

    def status(self, label: str) -> None:
        self._outer.status(label)

    @contextmanager
    def counter(self, label: str) -> Iterator[Callable[[int, int, float], None]]:
        del label
        yield lambda number, total, loss: self._reach(number / total)

    @contextmanager
    def bar(self, label: str) -> Iterator[Callable[[float, str], None]]:
        del label
        yield lambda share, now: self._reach(share)
