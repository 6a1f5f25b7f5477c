"""What a killed run needs to go on: a folder with the results of finished steps.

Each step writes files under temporary names and renames them, so that a file is whole or absent. Hidden states
are large, so they are written at most every `INTERVAL` seconds, and less often where that takes more than `SHARE` of
the time; the layers after the last state are done again, with the same results.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError
from ..files import holds_files, remove_tree, write_text, writing
from ..folders import Held, alone_in, check_unused
from .ranks import SINGLE, Ranks

if TYPE_CHECKING:
    from ..models.weights import Weights
    from .boundaries import States

_RUN = "run.json"
INTERVAL = 20.0
"""Fewest seconds between two states of a walk that are written."""
SHARE = 0.02
"""Largest share of the time that is spent on writing them."""


class Journal:
    """The results of one run in ``folder``, which is created with the first result.

    ``run``: JSON values that identify the run. Raises `OutputError` where the folder has results of another run.
    ``ranks``: the processes that share the run. The first one writes all but hidden states, of which each writes its
    own; they may have one file system or several. All must call `load`, `layer_done` and `resume` together.
    ``anew``: whether what an earlier run left is removed, which `alone` does. ``check``: called before writing, where
    `alone` is not used. Methods that write raise `OutputError` where the folder is not that of this run any more.
    """

    def __init__(
        self,
        folder: Path,
        run: Mapping[str, Any],
        ranks: Ranks = SINGLE,
        *,
        anew: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self._ranks, self._anew = folder, ranks, anew
        self.held: Held | None = None
        self._check_folder = check
        self._own = json.dumps(run, sort_keys=True, indent=1)
        if not anew:
            ranks.from_first(self._check)
        self._written, self._took = time.monotonic(), 0.0

    def _check(self) -> None:
        folder, own = self.folder, self._own
        identity = folder / _RUN
        if identity.is_file():
            if identity.read_text(encoding="utf-8") != own:
                if self.held is None:
                    check_unused(folder)
                raise OutputError(
                    f"'{folder}' has the results of an interrupted run with other settings; continue that one with its "
                    "own command, or start anew with --restart, which removes them"
                )
        elif folder.exists() and holds_files(folder):
            raise OutputError(f"'{folder}' is in the way: it is not the folder of an interrupted run; move it away")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While active, no other run works with this folder, see `alone_in`. Raises `OutputError` where another one
        does."""
        with ExitStack() as stack:
            self._ranks.from_first(lambda: self._enter(stack))
            yield

    def _enter(self, stack: ExitStack) -> None:
        self.held = stack.enter_context(alone_in(self.folder, anew=self._anew))
        # The results of a run that has ended since then are not those that were looked at.
        self._check()

    def check(self) -> None:
        """Raise `OutputError` where the folder was taken from this run."""
        if self.held is None:
            self._check_folder()
        else:
            self.held.check()

    @property
    def kept(self) -> bool:
        """Whether there are results with which the run can go on."""
        return self.held.still if self.held is not None else self.folder.exists()

    def load(self, name: str) -> Any:
        """The JSON value that `store` wrote under ``name``; None if there is none."""
        file = self.folder / f"{name}.json"
        return self._ranks.from_first(lambda: json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None)

    def store(self, name: str, value: Any) -> None:
        """Write a JSON value."""
        if not self._ranks.first:
            return
        self.check()
        self._create()
        write_text(self.folder / f"{name}.json", json.dumps(value))

    def keep(self, number: int, weights: Weights, names: Collection[str]) -> None:
        """Write the changed parameters ``names`` of a layer."""
        if not self._ranks.first:
            return
        self.check()
        self._create()
        with writing(self.folder):
            weights.keep(names, self._layer(number))

    def use(self, number: int, weights: Weights) -> bool:
        """Use the parameters of a layer that `keep` wrote from now on. Returns whether there are any."""
        file = self._layer(number)
        if not file.is_file():
            return False
        weights.use(file)
        return True

    def layer_done(self, state: Mapping[str, Any], states: Mapping[str, States]) -> None:
        """Write ``state`` (JSON values; ``layers``: how many are finished) and hidden states, if the last time is long
        enough ago."""
        if self._ranks.from_first(self._written_lately):
            return
        began = time.monotonic()
        layers = state["layers"]
        if self._ranks.first:
            # Before hidden states, without which a folder is not known as that of an interrupted run.
            self._create()
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
            for name, found in states.items():
                found.dump(self.folder / self._states(name, layers))
        # A state is complete only when the hidden states of all processes are written.
        self._ranks.wait()
        self.store("state", {**state, "states": list(states), "processes": self._ranks.count})
        self._ranks.wait()
        for old in self.folder.glob("*.states"):
            if not old.name.endswith(f"-{layers}.states"):
                old.unlink(missing_ok=True)
        self._written = time.monotonic()
        self._took = self._written - began

    def _written_lately(self) -> bool:
        self.check()
        return time.monotonic() - self._written < max(INTERVAL, self._took / SHARE)

    def resume(self, weights: Weights) -> tuple[dict[str, Any], dict[str, Path]] | None:
        """The last state, and the files of its hidden states, which `States.load` reads; None if there is none, or if
        it is that of another number of processes. The weights of finished layers are used from now on."""
        state = self.load("state")
        if state is None or state.get("processes", 1) != self._ranks.count:
            return None
        files = {name: self.folder / self._states(name, state["layers"]) for name in state["states"]}
        missing = sum(not file.is_file() for file in files.values())
        if any(self._ranks.totals(missing)):
            return None
        for number in range(state["layers"]):
            self.use(number, weights)
        return state, files

    def _states(self, name: str, layers: int) -> str:
        """The name of the file with hidden states of this process after so many layers."""
        own = f"{name}-{self._ranks.rank}" if self._ranks.count > 1 else name
        return f"{own}-{layers}.states"

    def _create(self) -> None:
        if not (self.folder / _RUN).is_file():
            with writing(self.folder):
                self.folder.mkdir(exist_ok=True)
            write_text(self.folder / _RUN, self._own)

    def remove(self) -> None:
        """Remove the folder, once the results of the run are saved, unless it is not that of this run any more."""
        if self._ranks.first:
            if self.kept:
                remove_tree(self.folder)
            return
        for file in self.folder.glob(f"*-{self._ranks.rank}-*.states"):
            file.unlink(missing_ok=True)
        # The folder is empty here where the first process has another file system.
        with suppress(OSError):
            self.folder.rmdir()

    def _layer(self, number: int) -> Path:
        return self.folder / f"layer-{number}.safetensors"
