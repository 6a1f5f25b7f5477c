"""Writing files and directories completely or not at all."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .amounts import bytes_text
from .errors import OutputError, first_line


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8. A regular file is written under a temporary name and renamed, so that a failure leaves
    the old content; a symbolic link keeps its target; a device or pipe is written to. Raises `OutputError`."""
    try:
        _check_links(path)
        real = path.resolve(strict=False)
        if real.exists() and not real.is_file():
            with real.open("w", encoding="utf-8") as stream:
                stream.write(text)
            return
        _replace(real, text)
    except (OSError, RuntimeError) as error:  # RuntimeError: a symbolic link that points at itself, before Python 3.13
        raise OutputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def json_text(value: Any, *, indent: int, ensure_ascii: bool = False) -> str:
    """``value`` as JSON with a final newline, where a list of nothing but numbers is on one line. Raises as
    `json.dumps` does."""
    text = json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)
    # The newlines of strings are escaped, so that one after "[" is never in a string.
    return re.sub(r"\[\n[-+.\deE,\s]+\]", lambda found: re.sub(r"\s", "", found[0]), text) + "\n"


def _check_links(path: Path) -> None:
    """Raise `OSError` for a symbolic link that leads to itself; for which `Path.exists` is False."""
    with suppress(FileNotFoundError, NotADirectoryError):
        path.stat()


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def holds_files(folder: Path, *, but: str | None = None) -> bool:
    """Whether anything is in a folder, other than the file ``but`` and what killed processes had begun to write, see
    `write_text` and `new_directory`."""
    names = (file.name for file in folder.iterdir())
    return any(name != but and not re.fullmatch(r"\..+\.\d+\.partial", name) for name in names)


def exists(path: Path) -> bool:
    """As `Path.exists`; False for what no file system takes as a name, such as one of 300 characters."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def check_new_directory(path: Path) -> Path:
    """``path``, once it is sure that the directory can be created. Raises `OutputError`."""
    with _unwritable(path):
        if path.exists() or path.is_symlink():
            raise OutputError(f"output directory '{path}' exists already; choose another or remove it")
        _check_parent(path)
    return path


def check_new_file(path: Path) -> Path:
    """``path``, once it is sure that a file can be written there. Raises `OutputError`."""
    with _unwritable(path):
        if path.is_dir():
            raise OutputError(f"'{path}' is a directory; name the file to write")
        _check_links(path)
        if not path.exists():
            _check_parent(path)
        elif not os.access(path, os.W_OK):
            raise OutputError(f"'{path}' cannot be written: permission denied")
    return path


def check_unused_file(path: Path) -> Path:
    """As `check_new_file`, for a result that took long and that nothing else keeps. Raises `OutputError` for a file
    that holds something, too; devices, pipes and empty files are written to."""
    with _unwritable(check_new_file(path)):
        # /dev/stdout may lead to a file that a shell appends to.
        given_open = path.absolute().parts[1:2] in (("dev",), ("proc",))
        if not given_open and path.is_file() and path.stat().st_size:
            raise OutputError(f"output file '{path}' exists already; choose another or remove it")
    return path


def _check_parent(path: Path) -> None:
    """Tries to create a directory beside ``path``, as permissions, name length and free inodes matter."""
    parent = path.resolve().parent
    if not parent.is_dir():
        raise OutputError(f"the folder '{parent}' that should hold '{path.name}' does not exist; create it first")
    # The temporary name that writing uses, which is longer than the final one.
    trial = parent / f".{path.name}.{os.getpid()}.partial"
    trial.mkdir()
    trial.rmdir()


@contextmanager
def _unwritable(path: Path) -> Iterator[None]:
    """What the system refuses about ``path``, a name that is too long as well, as an `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"'{path}' cannot be written: {error.strerror or error}") from error


def write_failure(error: BaseException) -> str | None:
    """Why the system did not take what was written, in plain words; None for an error that is something else.

    Libraries have errors of their own for it: safetensors gives the system's number, torch the name of its writer.
    """
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number is None and type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", text)):
        number = int(found[1])
    if number in _WRITING:
        return _WRITING[number]
    written_by_torch = isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text)
    return f"no space left on the device, or it fails ({first_line(error)})" if written_by_torch else None


_WRITING = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is exhausted",
    errno.EFBIG: "the file is larger than the system allows",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the device fails",
}


@contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """Errors of writing ``what`` as an `OutputError`: every `OSError`, and those of safetensors and torch."""
    try:
        yield
    except Exception as error:
        reason = write_failure(error)
        if reason is None and not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise OutputError(f"{what} cannot be written: {reason or first_line(error)}") from error


def check_space(path: Path, size: float, what: str) -> None:
    """Raise `OutputError` where the file system of the new ``path`` has less than ``size`` bytes free. ``what``: which
    bytes these are."""
    with _unwritable(path):
        free = shutil.disk_usage(path.resolve().parent).free
    if size > free:
        raise OutputError(
            f"'{path}' needs about {bytes_text(size)} of disk for {what}, and {bytes_text(free)} are free there; free "
            "some, or choose another place"
        )


def model_name(folder: Path) -> str:
    """The name of a model's folder; of a snapshot in the cache of the hub, which is named by its commit, that of the
    model."""
    real = folder.resolve()
    repository = real.parent.parent.name
    if real.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.split("--", 2)[-1]
    return real.name


def tree_bytes(folder: Path) -> int:
    """Bytes of all files in ``folder``; 0 where it does not exist."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def remove_tree(folder: Path) -> None:
    """Remove a folder with all that is in it; of a symbolic link, the folder that it leads to as well. What is not
    there, or cannot be removed, is left."""
    shutil.rmtree(folder.resolve(), ignore_errors=True)
    if folder.is_symlink():
        folder.unlink()


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
            with _unwritable(directory):
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


_TRIES = 100
"""To lock a folder that other runs remove as they end, or on a file system that numbers it anew each time."""


class Held:
    """A folder in which a run works alone, see `alone_in`. ``folder``: its path, by which files are written; whoever
    removes it or puts another one there takes it from the run. The open lock keeps its inode from being used again."""

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
