"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

from .errors import OutputError


def write_text(path: Path, text: str) -> None:
    """Write beside ``path``, then rename: an existing file is replaced only as a whole. Raises `OutputError`."""
    aside = path.with_name(path.name + ".partial")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
