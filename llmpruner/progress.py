"""How stages report progress, which the command line shows as bars, in the first of several processes; and silence of
other libraries."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Shows nothing; a subclass overrides `status` and `bar`, and `seconds` where it has a clock."""

    def status(self, label: str) -> None:
        """Show ``label``, for a stage of unknown length."""

    def seconds(self) -> float | None:
        """Since the command began; None outside of a command."""
        return None

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


def launched() -> bool:
    """Whether ``torchrun`` or ``accelerate launch`` started several processes, of which this is one."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process prints and writes files: of several, only the first does."""
    return not launched() or os.environ["RANK"] == "0"


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
