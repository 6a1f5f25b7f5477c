"""What a killed run needs to go on: a folder with the results of finished steps.

Each step writes files under temporary names and renames them, so that a file is whole or absent. States of hidden
states are large, so they are written at most every `INTERVAL` seconds; the layers after the last state are done again,
with the same results.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, first_line
from ..files import write_text

if TYPE_CHECKING:
    from .boundaries import States
    from .weights import Weights

_RUN = "run.json"
INTERVAL = 20.0
"""Seconds between two states of a walk that are written."""


class Journal:
    """The results of one run in ``folder``, which is created with the first result.

    ``run``: JSON values that identify the run. Raises `OutputError` where the folder has results of another run.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        own = json.dumps(run, sort_keys=True, indent=1)
        self._own = own
        identity = folder / _RUN
        if identity.is_file():
            if identity.read_text(encoding="utf-8") != own:
                raise OutputError(
                    f"'{folder}' has the results of an interrupted run with other settings; continue that one with its "
                    "own command, or start anew with --restart, which removes them"
                )
        elif folder.exists() and any(folder.iterdir()):
            raise OutputError(f"'{folder}' is in the way: it is not the folder of an interrupted run; move it away")
        self._written = time.monotonic()

    def load(self, name: str) -> Any:
        """The JSON value that `store` wrote under ``name``; None if there is none."""
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def store(self, name: str, value: Any) -> None:
        """Write a JSON value."""
        self._create()
        write_text(self.folder / f"{name}.json", json.dumps(value))

    def keep(self, number: int, weights: Weights, names: Collection[str]) -> None:
        """Write the changed parameters ``names`` of a layer."""
        self._create()
        with _one_line(self.folder):
            weights.keep(names, self._layer(number))

    def layer_done(self, state: Mapping[str, Any], states: Mapping[str, States]) -> None:
        """Write ``state`` (JSON values; ``layers``: how many are finished) and hidden states, if the last time is long
        enough ago."""
        if time.monotonic() - self._written < INTERVAL:
            return
        layers = state["layers"]
        with _one_line(self.folder):
            for name, found in states.items():
                found.dump(self.folder / f"{name}-{layers}.states")
        self.store("state", {**state, "states": {name: f"{name}-{layers}.states" for name in states}})
        for old in self.folder.glob("*.states"):
            if not old.name.endswith(f"-{layers}.states"):
                old.unlink()
        self._written = time.monotonic()

    def resume(self, weights: Weights) -> tuple[dict[str, Any], dict[str, Path]] | None:
        """The last state, and the files of its hidden states, which `States.load` reads; None if there is none. The
        weights of finished layers are used from now on."""
        state = self.load("state")
        if state is None:
            return None
        for number in range(state["layers"]):
            if (file := self._layer(number)).is_file():
                weights.use(file)
        return state, {name: self.folder / file for name, file in state["states"].items()}

    def _create(self) -> None:
        if not (self.folder / _RUN).is_file():
            with _one_line(self.folder):
                self.folder.mkdir(exist_ok=True)
            write_text(self.folder / _RUN, self._own)

    def remove(self) -> None:
        """Remove the folder, once the results of the run are saved."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _layer(self, number: int) -> Path:
        return self.folder / f"layer-{number}.safetensors"


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Errors of writing as an `OutputError`."""
    try:
        yield
    except Exception as error:
        # safetensors reports a full disk with an exception of its own.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise OutputError(f"{folder} cannot be written: {first_line(error)}") from error
