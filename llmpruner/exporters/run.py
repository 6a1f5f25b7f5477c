"""One export: to a temporary directory, which is renamed after the exporter has checked it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import PluginError
from ..folders import new_directory
from ..progress import QUIET, Progress
from .base import Exporter, ExportSource, ExportTask


def export(
    source: Path,
    exporter: Exporter,
    directory: Path,
    load: Callable[[], ExportSource],
    progress: Progress = QUIET,
    dtype: str | None = None,
) -> str:
    """Write the checkpoint ``source`` to the new ``directory`` in the exporter's format; returns one line on how to
    load the result.

    ``load``: loads the source; called only by exporters that need the model in memory. ``dtype``: the type that it was
    asked to be loaded as, if any.

    Raises `OutputError` when ``directory`` exists or cannot be written, `PluginError` when the exporter wrote nothing,
    and whatever the exporter raises; no files remain then.
    """
    with new_directory(directory) as partial:
        line = exporter.export(ExportTask(source, partial, load, progress, dtype))
        if not any(partial.iterdir()):
            raise PluginError(f"{exporter.label()} wrote no file")
    return line
