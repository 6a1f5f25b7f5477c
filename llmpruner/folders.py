"""Folders that one process writes: new ones, which appear as a whole; temporary ones; and the work folder of a run.

A lock on the folder, which the system releases with the process, tells a folder in use from one that a killed process
left.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError
from .files import writing

_TRIES = 100
"""To lock a folder that other runs remove as they end, or on a file system that numbers it anew each time."""


class Held:
    """A folder that is locked for one run, see `alone_in`. ``folder``: its path, by which files are written. Another
    process may still remove or replace it, which `check` finds by the inode: the open lock keeps its number from being
    given to another folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._found = folder, _inode(folder)

    @property
    def still(self) -> bool:
        """Whether the path still leads to this folder."""
        return self._found is not None and _inode(self.folder) == self._found

    def is_open_as(self, descriptor: int) -> bool:
        """Whether the file ``descriptor`` is of this folder."""
        facts = os.fstat(descriptor)
        return self._found == (facts.st_dev, facts.st_ino)

    def check(self) -> None:
        """Raise `OutputError` where the path leads to another folder, or to none."""
        if not self.still:
            raise OutputError(
                f"'{self.folder}', in which this run keeps its state, was removed or replaced; the run stops, as its "
                "results would mix with those of another one"
            )


@contextmanager
def alone_in(folder: Path, *, anew: bool = False) -> Iterator[Held]:
    """While active, no other process can be in this block for the same ``folder``, which is created where it does not
    exist, and removed at the end if nothing is in it. ``anew``: whether all that is in it is removed first.

    Raises `OutputError` where another process is in such a block, and for a folder that cannot be created. Where
    directories cannot be locked, nothing keeps other processes out.
    """
    for _ in range(_TRIES):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock = _lock_unless_taken(folder)
        held = Held(folder)
        # A run that ended since may have removed what was locked here, and another may have a new one by now.
        if held.still and (lock is None or held.is_open_as(lock)):
            break
        if lock is not None:
            os.close(lock)
    else:
        raise OutputError(f"'{folder}' is removed or replaced as soon as it is created; choose another output")
    try:
        if anew:
            _empty(folder)
        yield held
    finally:
        if held.still:
            with suppress(OSError):  # something is in it
                folder.rmdir()
        if lock is not None:
            os.close(lock)


def check_unused(folder: Path) -> None:
    """Raise `OutputError` where another process works in ``folder``, see `alone_in`."""
    lock = _lock_unless_taken(folder)
    if lock is not None:
        os.close(lock)


def _lock_unless_taken(folder: Path) -> int | None:
    try:
        return _lock(folder)
    except BlockingIOError:
        raise OutputError(f"another run works in '{folder}'; wait for its end, or choose another output") from None


def _inode(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another one that has the same path later; None where there is none."""
    try:
        facts = folder.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def _empty(folder: Path) -> None:
    """Remove what is in a folder; what cannot be removed is left."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _lock(folder: Path) -> int | None:
    """A file descriptor that holds a lock on ``folder``, which the system releases when the process ends in any way;
    None where directories cannot be locked (Windows, some network file systems). Raises `BlockingIOError` where it is
    held already."""
    try:
        import fcntl
    except ImportError:
        return None
    found = -1
    try:
        found = os.open(folder, os.O_RDONLY)
        fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if found >= 0:
            os.close(found)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return found
