"""Progress as the stages see it: a plain interface, so that libraries stay silent and the CLI can draw bars."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


QUIET = Progress()
"""Shows nothing; it keeps no state."""
