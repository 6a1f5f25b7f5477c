"""Progress as the stages see it: a plain interface, so that libraries stay silent and the CLI can draw bars."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Says nothing. The command line passes one that draws."""

    def track(self, items: Sequence[T], label: str) -> Iterable[T]:
        """``items``, with the passage through them shown under ``label``."""
        del label
        return items

    def status(self, label: str) -> None:
        """A stage of unknown length begins."""
        del label

    @contextmanager
    def counter(self, label: str) -> Iterator[Callable[[int, int, float], None]]:
        """A bar that is moved by ``step(number from 1, total, loss)``."""
        del label
        yield lambda number, total, loss: None


QUIET = Progress()
"""Shows nothing; it keeps no state."""
