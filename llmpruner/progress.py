"""The interface by which stages report progress, which the command line implements with progress bars; and silence of
other libraries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Shows nothing; subclasses override what they show."""

    def track(self, items: Sequence[T], label: str) -> Iterable[T]:
        """Iterates over ``items`` and shows how many were processed, under ``label``."""
        del label
        return items

    def status(self, label: str) -> None:
        """Shows ``label``, for a stage of unknown length."""
        del label

    @contextmanager
    def counter(self, label: str) -> Iterator[Callable[[int, int, float], None]]:
        """Yields a function ``step(number, total, loss)`` to call after each step; ``number`` counts from 1."""
        del label
        yield lambda number, total, loss: None

    @contextmanager
    def bar(self, label: str) -> Iterator[Callable[[float, str], None]]:
        """Yields a function ``at(share, label)`` to call with the share of the work that is done, from 0 to 1, and the
        name of what is being done; shows the time left."""
        del label
        yield lambda share, now: None


QUIET = Progress()


@contextmanager
def only_errors(name: str) -> Iterator[None]:
    """A block in which the logger ``name`` shows errors alone."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
