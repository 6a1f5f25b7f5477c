"""The record of the steps that were done, ``recipe.json`` in the output folder of a recipe.

A step's result counts as done when its record is in the file. Before a step begins, the file says that it is running,
so that a killed run can tell a whole result, whose folder appears in one moment, from one of earlier inputs that was to
be removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import OutputError, first_line
from ..files import check_new_directory, holds_files, write_text, writing
from ..folders import Held, check_unused
from ..models.record import OF_THIS_MACHINE, sha256
from ..progress import QUIET, Progress

STATE, LOCK = "recipe.json", ".recipe.lock"
VERSION = 1
_WORK = (".pruning", ".recovery")
"""Endings of the folders in which an interrupted step keeps what it has done."""
_LARGE = 2 << 30


class Hashes:
    """SHA-256 of files. A file whose size and time of change are those of a former call is not read again."""

    def __init__(self, known: dict[str, list[Any]], progress: Progress = QUIET) -> None:
        self.known, self._progress = known, progress

    def __call__(self, file: Path) -> str:
        """Raises `OutputError` for a file that cannot be read."""
        key = str(file.resolve())
        try:
            facts = file.stat()
            found = self.known.get(key)
            if found is None or found[:2] != [facts.st_size, facts.st_mtime_ns]:
                if facts.st_size > _LARGE:
                    self._progress.status(f"reading {file} once, for its checksum")
                self.known[key] = found = [facts.st_size, facts.st_mtime_ns, sha256(file)]
        except OSError as error:
            raise OutputError(f"{file} cannot be read: {error.strerror or error}") from error
        return str(found[2])


class State:
    """The state of the steps in ``folder``. Nothing is written before `save`. ``held``: the folder, where this process
    is alone in it.

    Raises `OutputError` for a folder that holds anything else, and for a damaged file.
    """

    def __init__(self, folder: Path, progress: Progress = QUIET, held: Held | None = None) -> None:
        self.folder, self._file, self._held = folder, folder / STATE, held
        found = self._read()
        self.steps: dict[str, dict[str, Any]] = found.get("steps", {})
        """Name → ``inputs``, ``files`` (SHA-256 by name), ``result`` and ``seconds``."""
        self.running: dict[str, dict[str, Any]] = found.get("running", {})
        """Name → ``inputs`` of every step that was begun; ``clearing`` while an older result of it is removed."""
        self.hashes = Hashes(found.get("hashes", {}), progress)

    def _read(self) -> dict[str, Any]:
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"'{self.folder}' is no folder; choose another output")
        try:
            if not self._file.exists():
                if self.folder.exists() and holds_files(self.folder, but=LOCK):
                    raise OutputError(
                        f"'{self.folder}' exists already, and no recipe was run in it; choose another output"
                    )
                return {}
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise OutputError(f"{self._file} cannot be read: {first_line(error)}; remove '{self.folder}'") from error
        if not isinstance(found, dict) or found.get("version") != VERSION:
            raise OutputError(f"{self._file} is damaged, or of another version; choose another output")
        return found

    def save(self) -> None:
        """Write the file, whole or not at all. Raises `OutputError`, as all methods that write do, where the folder was
        removed or replaced."""
        self._check()
        value = {"version": VERSION, "steps": self.steps, "running": self.running, "hashes": self.hashes.known}
        write_text(self._file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def files(self, name: str) -> dict[str, str]:
        """SHA-256 of the files of a step, by their names inside its folder, without those that differ every time."""
        return {file: self.hashes(path) for file, path in _files_in(self.folder / name).items()}

    def is_there(self, name: str) -> bool:
        """Whether the folder of a recorded step exists. Raises `OutputError` where one of its files is missing or was
        changed: what the user did to it must not be lost."""
        folder = self.folder / name
        if not folder.exists():
            return False
        for file, digest in self.steps[name]["files"].items():
            if not (folder / file).is_file() or self.hashes(folder / file) != digest:
                raise OutputError(
                    f"'{folder}' is not as the step left it ({file}); move it away to keep it, or remove it to do the "
                    "step again"
                )
        return True

    def check_removable(self, name: str) -> None:
        """Raise `OutputError` where the folder of a recorded step holds files that the step did not write (a conversion
        of its model, say): they would be removed with it. Those of this machine, and hidden ones, may be lost."""
        folder = self.folder / name
        added = _files_in(folder).keys() - self.steps[name]["files"].keys()
        kept = sorted(file for file in added if not any(part.startswith(".") for part in Path(file).parts))
        if kept:
            raise OutputError(
                f"'{folder}' is to be replaced, and the step did not write all that is in it ({kept[0]}); move that "
                "file away to keep it, or remove it"
            )

    def work_of(self, name: str) -> list[Path]:
        """The folders in which an interrupted step keeps what it has done."""
        return [path for path in (self.folder / (name + ending) for ending in _WORK) if path.is_dir()]

    def goes_on(self, name: str) -> Mapping[str, Any] | None:
        """The inputs of a step that a killed run had begun; None if it had not."""
        found = self.running.get(name)
        return None if found is None or found["clearing"] else found["inputs"]

    def begin(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Make way for a step. Returns whether a killed run had finished it. What a killed run did of the same inputs
        stays; everything else of the step is removed."""
        folder = self.folder / name
        if self.goes_on(name) == inputs:
            self._remove_partial(name)
            return folder.exists()
        if folder.exists() and name not in self.steps and name not in self.running:
            raise OutputError(f"'{folder}' exists already, and no step of a recipe made it; move it away")
        self.running[name] = {"inputs": dict(inputs), "clearing": True}
        self.save()
        self._remove(name)
        self.steps.pop(name, None)
        self.running[name]["clearing"] = False
        self.save()
        return False

    def finish(
        self, name: str, inputs: Mapping[str, Any], result: Any, seconds: float, order: Sequence[str] = ()
    ) -> None:
        """Record a finished step, and remove what is left of its work. ``order``: names of the recipe's steps, in which
        their records are kept, after those of other steps."""
        self._check()
        for folder in self.work_of(name):
            shutil.rmtree(folder)
        record = {"inputs": dict(inputs), "files": self.files(name), "result": result, "seconds": round(seconds, 1)}
        self.steps[name] = record
        self.steps = {one: self.steps[one] for one in sorted(self.steps, key=_place_in(order))}
        self.running.pop(name, None)
        self.save()

    def clear(self) -> None:
        """Remove the results of all recorded steps, and all that interrupted ones have done."""
        for name in dict.fromkeys([*self.steps, *self.running]):
            self.running[name] = {"inputs": {}, "clearing": True}
            self.save()
            self._remove(name)
            self.steps.pop(name, None)
            del self.running[name]
            self.save()

    def _check(self) -> None:
        if self._held is not None:
            self._held.check()

    def _remove(self, name: str) -> None:
        self._check()
        for work in self.work_of(name):
            # The command of a step may run without the recipe.
            check_unused(work)
        try:
            for folder in (self.folder / name, *self.work_of(name)):
                if folder.exists():
                    shutil.rmtree(folder)
        except OSError as error:
            raise OutputError(f"'{folder}' cannot be removed: {error.strerror or error}") from error
        self._remove_partial(name)

    def _remove_partial(self, name: str) -> None:
        """Remove what a killed process had begun to write."""
        for folder in self.folder.glob(f".{name}.*.partial"):
            shutil.rmtree(folder, ignore_errors=True)


def _files_in(folder: Path) -> dict[str, Path]:
    """The files of a result, by their names inside its folder, without those that differ every time."""
    found = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in OF_THIS_MACHINE)
    return {file.relative_to(folder).as_posix(): file for file in found}


def _place_in(order: Sequence[str]) -> Callable[[str], int]:
    places = {name: place for place, name in enumerate(order)}
    return lambda name: places.get(name, -1)


@contextmanager
def locked(folder: Path) -> Iterator[Held]:
    """The folder, created where it does not exist, for this process alone. Raises `OutputError`."""
    if not folder.exists():
        check_new_directory(folder)
        # Another run may have created it meanwhile: the lock decides which of them goes on.
        with writing(folder):
            folder.mkdir(exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(f"another run works on '{folder}'; wait for its end, or choose another output") from error
    except (OSError, NotImplementedError) as error:
        raise OutputError(f"'{folder}' cannot be locked: {getattr(error, 'strerror', None) or error}") from error
    try:
        yield Held(folder)
    finally:
        lock.release()
