"""What a killed run needs to go on: a folder with the results of finished steps."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import LlmprunerError, OutputError, ProcessError
from ..files import alone_in, write_text, writing
from ..models.weights import Weights
from ..progress import QUIET, Progress
from ..values import counted
from .boundaries import States
from .ranks import SINGLE, Ranks

_RUN = "run.json"
SHARE = 0.02
"""Of the time for writing hidden states, at most; layers after the last ones that were written are done again."""


class Journal:
    """The results of one run in ``folder``, used inside `running`. ``run``: JSON values that identify the run. Each of
    ``ranks`` writes its hidden states, the first all else; all call `load`, `layer_done` and `resume` together."""

    def __init__(self, folder: Path, run: Mapping[str, Any], ranks: Ranks = SINGLE) -> None:
        self.folder, self._ranks = folder, ranks
        self._identity = json.dumps(run, sort_keys=True, indent=1)
        self._written, self._took = time.monotonic(), 0.4  # a guess, until states were written once

    @contextmanager
    def running(self, progress: Progress = QUIET, *, anew: bool = False, stays: bool = False) -> Iterator[None]:
        """While active, the folder is locked. It stays if the run is interrupted, or can't write its result, and at the
        end if it ``stays`` for another part of the run. ``anew``: remove what an earlier run left. Raises `OutputError`
        where another run works, or left results."""
        with ExitStack() as stack:
            self._ranks.from_first(lambda: self._enter(stack, anew))
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)  # where other processes have another file system
            if done := self._done():
                progress.status(f"continuing the interrupted run in {self.folder}; done: {done}")
            try:
                yield
            except BaseException as error:
                refused = isinstance(error, LlmprunerError) and not isinstance(error, OutputError | ProcessError)
                if refused or not self.kept:
                    self._remove()
                elif isinstance(error, KeyboardInterrupt | OutputError):
                    why = "stopped" if isinstance(error, KeyboardInterrupt) else "what was computed is kept"
                    progress.status(f"{why}; the same command goes on from {self.folder}, --restart starts anew")
                raise
            if not stays:
                self._remove()

    def _enter(self, stack: ExitStack, anew: bool) -> None:
        """Lock the folder. Raises `OutputError` where it is not that of this run."""
        stack.enter_context(alone_in(self.folder, _RUN, anew=anew))
        for left in self.folder.glob(".*.partial"):  # weights that a killed process converted
            shutil.rmtree(left, ignore_errors=True)
        identity = self.folder / _RUN
        if identity.is_file() and identity.read_text(encoding="utf-8") != self._identity:
            if self._done():
                before, now = (_flat(json.loads(text)) for text in (identity.read_text("utf-8"), self._identity))
                differ = [name for name in sorted({**before, **now}) if before.get(name) != now.get(name)]
                shown = (
                    f"{name} ({before.get(name)}, now {now.get(name)})"
                    if name.startswith("prune.")
                    else name  # no hash
                    for name in differ
                )
                raise OutputError(
                    f"'{self.folder}' has the results of an interrupted run that differs in {', '.join(shown)}; "
                    "continue that one with its own command, or start anew with --restart, which removes them"
                )
            for file in self.folder.iterdir():
                file.unlink()
        write_text(identity, self._identity)

    def _done(self) -> str:
        done = [name for name in ("calibration", "plan") if (self.folder / f"{name}.json").is_file()]
        if layers := len(list(self.folder.glob("layer-*"))):
            done.append(counted(layers, "layer"))
        return ", ".join(done)

    @property
    def kept(self) -> bool:
        """Whether there are results with which the run can go on."""
        return any(file.name != _RUN for file in self.folder.glob("*"))

    def load(self, name: str) -> Any:
        """The JSON value that `store` wrote under ``name``; None if there is none."""
        file = self.folder / f"{name}.json"
        return self._ranks.from_first(lambda: json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None)

    def store(self, name: str, value: Any) -> None:
        if self._ranks.first:
            write_text(self.folder / f"{name}.json", json.dumps(value))

    def keep(self, number: int, weights: Weights, names: Collection[str], *, used: bool = True) -> None:
        """Write the changed parameters ``names`` of a layer. ``used``: as in `Weights.keep`."""
        if self._ranks.first:
            with writing(self.folder):
                weights.keep(names, self._layer(number), used=used)

    def layer_done(self, state: Mapping[str, Any], states: Mapping[str, States]) -> None:
        """Write hidden states and ``state`` (JSON with the number of ``layers`` done), if the last time is long ago."""
        began = time.monotonic()
        if self._ranks.from_first(lambda: began - self._written < self._took / SHARE):
            return
        layers = state["layers"]
        with writing(self.folder):
            for name, hidden in states.items():
                hidden.dump(self._states(name, layers))
        # A state is complete only when the hidden states of all processes are written.
        self._ranks.wait()
        self.store("state", {**state, "states": list(states), "processes": self._ranks.count})
        self._ranks.wait()
        for old in self.folder.glob("*.states"):
            if not old.name.endswith(f"-{layers}.states"):
                old.unlink(missing_ok=True)
        self._written = time.monotonic()
        self._took = self._written - began

    def all_done(self, state: Mapping[str, Any]) -> None:
        """Write the last ``state``, after which no hidden states are needed."""
        self.store("state", {**state, "states": [], "processes": self._ranks.count})

    def resume(self, weights: Weights) -> tuple[dict[str, Any], dict[str, Path]] | None:
        """The last state and its files of hidden states, if any; weights of finished layers are used from now on."""
        state = self.load("state")
        if state is None or state["processes"] != self._ranks.count:
            return None
        files = {name: self._states(name, state["layers"]) for name in state["states"]}
        (missing,) = self._ranks.totals(sum(not file.is_file() for file in files.values()))
        if missing:
            return None
        for layer in map(self._layer, range(state["layers"])):
            if layer.is_file():
                weights.use(layer)
        return state, files

    def _remove(self) -> None:
        if self._ranks.first:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for file in self.folder.glob(f"*-{self._ranks.rank}-*.states"):
            file.unlink(missing_ok=True)
        # The folder is empty here where the first process has another file system.
        with suppress(OSError):
            self.folder.rmdir()

    def _layer(self, number: int) -> Path:
        return self.folder / f"layer-{number}.safetensors"

    def _states(self, name: str, layers: int) -> Path:
        """The file with hidden states of this process after so many layers."""
        name = f"{name}-{self._ranks.rank}" if self._ranks.count > 1 else name
        return self.folder / f"{name}-{layers}.states"


def recalled(journal: Journal | None, name: str, make: Callable[[], Any]) -> Any:
    """The JSON value ``name`` of ``journal``; where there is none, that of ``make``, which is stored."""
    value = None if journal is None else journal.load(name)
    if value is None:
        value = make()
        if journal is not None:
            journal.store(name, value)
    return value


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The values of nested mappings by ``outer.inner``."""
    if not isinstance(value, Mapping):
        return {name: value}
    parts = (_flat(each, f"{name}.{key}" if name else key) for key, each in value.items())
    return {key: each for part in parts for key, each in part.items()}
