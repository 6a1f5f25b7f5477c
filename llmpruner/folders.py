"""Folders that one process writes: new ones, which appear as a whole; temporary ones; and the work folder of a run.

A lock on the folder, which the system releases with the process, tells a folder in use from one that a killed process
left.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError
from .files import unwritable, writing


@contextmanager
def new_directory(directory: Path, *, empty: bool = False) -> Iterator[Path]:
    """Yields a temporary directory, which is renamed to ``directory`` at the end and removed when anything fails. Those
    that killed processes left for the same ``directory`` are removed first. ``empty``: whether ``directory`` may exist
    if nothing is in it.

    Raises `OutputError` when ``directory`` exists or cannot be written.
    """
    taken = empty and directory.is_dir() and not any(directory.iterdir())
    if directory.exists() and not taken:
        raise OutputError(f"output directory '{directory}' exists already; choose another or remove it")
    _remove_abandoned(directory)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    lock = None
    try:
        with writing(directory):
            with unwritable(directory):
                partial.mkdir(parents=True)
            lock = _lock(partial)
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    # safetensors makes its files private to their owner; the directory's mode follows the user's umask.
                    file.chmod(partial.stat().st_mode & 0o666)
            if taken:
                directory.rmdir()
            partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def scratch_folder(prefix: str, parent: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """A new folder in ``parent`` (None: where the system has such folders) whose name begins with ``prefix``, removed
    with the object and at the end of the process. Those that killed processes left there are removed first."""
    within = Path(tempfile.gettempdir()) if parent is None else parent
    _remove_unused(within.glob(f"{glob.escape(prefix)}*"))
    while True:
        folder = tempfile.TemporaryDirectory(prefix=prefix, dir=within)
        lock = _lock(Path(folder.name))
        if lock is not None:
            weakref.finalize(folder, os.close, lock)
        # Another process may have removed it before it was locked.
        if Path(folder.name).is_dir():
            return folder


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


def _remove_abandoned(directory: Path) -> None:
    """Remove temporary directories of `new_directory` that no process writes any more."""
    partials = directory.parent.glob(f".{glob.escape(directory.name)}.*.partial")
    _remove_unused(p for p in partials if re.fullmatch(r"\.\d+\.partial", p.name[len(directory.name) + 1 :]))


def _remove_unused(folders: Iterable[Path]) -> None:
    """Remove those of the ``folders`` that no process holds a lock on."""
    for folder in folders:
        if folder.is_dir():
            with suppress(BlockingIOError):
                lock = _lock(folder)
                if lock is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(lock)
