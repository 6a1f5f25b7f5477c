"""Exporter: writes a checkpoint in the form that another runtime reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component
from ..progress import QUIET, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ExportTask:
    """``source``: the checkpoint, a directory. ``model``, ``tokenizer``: loaded from it (tokenizer None where it has
    none). ``directory``: new and empty; it gets its final name when `Exporter.export` returns, and is removed when it
    raises."""

    source: Path
    model: PreTrainedModel
    tokenizer: Any | None
    directory: Path
    progress: Progress = QUIET


class Exporter(Component):
    """Writes one format. What is written must be checked, by loading or by comparing outputs, before it returns."""

    kind: ClassVar[str] = "exporter"

    def export(self, task: ExportTask) -> str:
        """Write into ``task.directory``; returns one line that says what loads the result.

        Raises `UnsupportedModelError` for a model that the format cannot hold.
        """
        raise NotImplementedError
