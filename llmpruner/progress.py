"""How stages report progress, which the command line shows as bars; and silence of other libraries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Shows nothing; a subclass overrides `status` and `bar`."""

    def status(self, label: str) -> None:
        """Show ``label``, for a stage of unknown length."""

    @contextmanager
    def bar(self, label: str) -> Iterator[Callable[[float, str], None]]:
        """Yield a function ``at(share, label)`` to call with the share of the work that is done, from 0 to 1, and what
        is being done."""
        yield lambda share, label: None

    def track(self, items: Sequence[T], label: str) -> Iterable[T]:
        """Iterate over ``items`` and show how many were processed."""
        with self.bar(label) as at:
            for number, item in enumerate(items):
                at(number / len(items), label)
                yield item


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
