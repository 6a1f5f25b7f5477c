"""One export: written aside, checked by its exporter, and renamed when it is whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import PluginError
from ..files import new_directory
from ..progress import QUIET, Progress
from .base import Exporter, ExportSource, ExportTask


def export(
    source: Path,
    exporter: Exporter,
    directory: Path,
    load: Callable[[], ExportSource],
    progress: Progress = QUIET,
) -> str:
    """Write the checkpoint ``source`` to the new ``directory`` in the exporter's format; returns one line that says
    what loads the result.

    ``load``: loads the source; called only by exporters that need the model in memory.

    Raises `OutputError` when ``directory`` exists or cannot be written, `PluginError` when the exporter wrote nothing,
    and whatever the exporter raises; nothing is then left at ``directory`` or beside it.
    """
    with new_directory(directory) as partial:
        line = exporter.export(ExportTask(source, partial, load, progress))
        if not any(partial.iterdir()):
            raise PluginError(f"{exporter.label()} wrote no file")
    return line
