"""``llmpruner.json``: the record of how a checkpoint was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, first_line

RECORD_FILE = "llmpruner.json"
ORIGIN_FILE = "llmpruner-files.json"
"""The record of a directory whose model has no plans: adapters, and what an export wrote for transformers. It has
the origin of the files and their hashes. A ``llmpruner.json`` would make it a pruned model."""
RUN_FILE = "run.json"
REPORT_FILE = "report.html"
OF_THIS_MACHINE = (RUN_FILE, REPORT_FILE)
"""Files beside a checkpoint about the machine and the time that the run took. No result depends on them, and they are
not published."""


def record_text(value: Any) -> str:
    """JSON for a file in UTF-8, with halves of surrogate pairs, which configurations may contain, escaped."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=1, allow_nan=False)
    return text + "\n"


def read_record(path: str | Path) -> dict[str, Any] | None:
    """The JSON object in ``llmpruner.json``; None where there is no such file. Raises `CheckpointError`."""
    file = Path(path) / RECORD_FILE
    return read_json(file) if file.is_file() else None


def read_any_record(path: str | Path) -> dict[str, Any] | None:
    """The JSON object in ``llmpruner.json``, else in ``llmpruner-files.json``; None where neither is. Raises
    `CheckpointError`."""
    record = read_record(path)
    file = Path(path) / ORIGIN_FILE
    return read_json(file) if record is None and file.is_file() else record


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``. Raises `CheckpointError`."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: expected a JSON object")
    return value
