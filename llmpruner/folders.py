"""`alone_in` as recovery calls it; to be removed with its last user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import files


class Held:
    """A folder that is locked for one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self) -> None:
        """Nothing to check: the lock is held until the end."""


@contextmanager
def alone_in(folder: Path, *, anew: bool = False) -> Iterator[Held]:
    """See `files.alone_in`."""
    with files.alone_in(folder, anew=anew):
        yield Held(folder)
