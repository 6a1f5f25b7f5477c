"""Results that are kept on disk, so that what was measured once is not measured again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import OutputError, first_line
from ..files import json_text, write_text

_LOG = logging.getLogger("llmpruner")
_LAYOUT = 1
"""Number of the layout of the files; others are not read."""
_FILES = "files.json"


def default_folder() -> Path:
    """``$LLMPRUNER_CACHE``, else ``llmpruner`` in the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``)."""
    if own := os.environ.get("LLMPRUNER_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmpruner"


class ResultStore:
    """Results in ``folder``, one file each, named by the SHA-256 of all that the result depends on.

    ``again``: nothing is found, so that everything is measured again, and replaces what was kept. Raises `OutputError`
    where ``folder`` is a file. A folder that cannot be written is reported once, as a warning: what was measured is
    still shown.
    """

    def __init__(self, folder: Path, *, again: bool = False) -> None:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"'{folder}' is a file; results are kept in a folder")
        self.folder, self._again = folder, again
        self._warned = False

    def find(self, identity: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The result that was kept for ``identity`` (JSON values); None if there is none."""
        if self._again:
            return None
        text, file = self._named(identity)
        found = _read(file)
        return found["result"] if found and found.get("identity") == json.loads(text) else None

    def keep(self, identity: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Write a result of JSON values, which may include numbers that are not finite."""
        text, file = self._named(identity)
        self._write(file, json_text({"identity": json.loads(text), "result": result}, indent=1, ensure_ascii=True))

    @property
    def known_files(self) -> dict[str, list[Any]]:
        """Checksums of model files, by path, with the size and time of change for which they hold."""
        known: dict[str, list[Any]] = (_read(self.folder / _FILES) or {}).get("files", {})
        return known

    def keep_files(self, known: Mapping[str, list[Any]]) -> None:
        """Write checksums of model files for later calls."""
        self._write(self.folder / _FILES, json.dumps({"files": known}, indent=1) + "\n")

    def _named(self, identity: Mapping[str, Any]) -> tuple[str, Path]:
        text = json.dumps({"layout": _LAYOUT, **identity}, sort_keys=True)
        return text, self.folder / "evaluations" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"

    def _write(self, file: Path, text: str) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, text)
        except (OSError, OutputError) as error:
            if not self._warned:
                _LOG.warning("results are not kept for another run: %s", first_line(error))
            self._warned = True


def _read(file: Path) -> dict[str, Any] | None:
    """The JSON object in ``file``; None where there is none, also after a damage: it is then measured again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
