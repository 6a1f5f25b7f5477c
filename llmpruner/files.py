"""Files and folders: written as a whole or not at all, checked before long work, and locked for one run."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import CheckpointError, OutputError, first_line
from .values import bytes_text

WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf")
"""What names of files with weights end with."""


def weights_size(place: Path) -> int:
    """Bytes of a file with weights, or of all such files in a folder."""
    files = [place] if place.is_file() else place.glob("*")
    return sum(file.stat().st_size for file in files if file.suffix in WEIGHTS)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to a temporary file, and rename it: a failure leaves the old content. A symbolic link
    keeps its target; a device or pipe is written to. Raises `OutputError`."""
    with writing(path):
        real = path.resolve()
        if real.exists() and not real.is_file():
            real.write_text(text, encoding="utf-8")
            return
        aside = real.with_name(f".{real.name}.{os.getpid()}.partial")
        try:
            aside.write_text(text, encoding="utf-8")
            aside.replace(real)
        finally:
            aside.unlink(missing_ok=True)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``. Raises `CheckpointError`."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: expected a JSON object")
    return value


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Yields a temporary directory, which becomes ``directory`` at the end and is removed when anything fails. Raises
    `OutputError` when ``directory`` exists or cannot be written."""
    if directory.exists():
        raise OutputError(f"output directory '{directory}' exists already; choose another")
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        with writing(directory):
            partial.mkdir(parents=True)
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    # safetensors makes its files private to their owner; the directory's mode follows the user's umask.
                    file.chmod(partial.stat().st_mode & 0o666)
            partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def alone_in(folder: Path, mark: str | None = None, *, anew: bool = False) -> Iterator[None]:
    """Lock ``folder``, which is created, and removed at the end if empty. ``mark``: a file without which it must be
    empty at the start. ``anew``: empty it first. Raises `OutputError` when another process has locked it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        others = any(not path.name.endswith(".partial") for path in folder.iterdir())
        if mark is not None and others and not (folder / mark).is_file():
            raise OutputError(f"'{folder}' is not the folder of an interrupted run; move it away")
        if anew:
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
        yield
    finally:
        with suppress(OSError):  # something is in it, or it is gone
            folder.rmdir()
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A file descriptor that holds a lock on ``folder``, which the system releases with the process."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(f"another run works in '{folder}'; wait for its end, or choose another output") from None
    except OSError:  # a file system without locks
        pass
    return descriptor


def check_new_directory(path: Path) -> Path:
    """``path``, if a directory can be created there. Raises `OutputError`."""
    with writing(path):
        if path.exists() or path.is_symlink():
            raise OutputError(f"output directory '{path}' exists already; choose another")
        _check_parent(path)
    return path


def check_new_file(path: Path) -> None:
    """Raise `OutputError` unless a file can be written to ``path`` without replacing one that is not empty."""
    with writing(path):
        if path.is_dir():
            raise OutputError(f"'{path}' is a directory; name the file to write")
        if path.is_file() and path.stat().st_size:
            raise OutputError(f"output file '{path}' exists already; choose another or remove it")
        if not path.exists():
            _check_parent(path)


def _check_parent(path: Path) -> None:
    """Create and remove a directory next to ``path``: permissions, name length and free inodes matter."""
    if not (parent := path.resolve().parent).is_dir():
        raise OutputError(f"the folder '{parent}' that should hold '{path.name}' does not exist; create it first")
    # A temporary name, which is longer than the final one.
    trial = parent / f".{path.name}.{os.getpid()}.partial"
    trial.mkdir()
    trial.rmdir()


@contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """Turn errors of writing ``what`` into `OutputError`: every `OSError`, and those of safetensors and torch."""
    try:
        yield
    except Exception as error:
        reason = write_failure(error) or (first_line(error) if isinstance(error, OSError) else None)
        if reason is None:
            raise
        raise OutputError(f"{what} cannot be written: {reason}") from error


def write_failure(error: BaseException) -> str | None:
    """Why the disk refused a write; None for other errors."""
    if isinstance(error, OSError):
        failed = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
        return os.strerror(error.errno).lower() if failed and error.errno else None
    line = first_line(error)
    by_safetensors = type(error).__name__ == "SafetensorError" and "os error" in line
    return line if by_safetensors or "PytorchStreamWriter" in line else None


def check_space(path: Path, size: float, what: str) -> None:
    """Raise `OutputError` where the file system of the new ``path`` has less than ``size`` bytes free for ``what``."""
    if size > (free := shutil.disk_usage(path.resolve().parent).free):
        raise OutputError(
            f"'{path}' needs about {bytes_text(size)} of disk for {what}, "
            f"and {bytes_text(free)} are free there; free some, or choose another place"
        )
