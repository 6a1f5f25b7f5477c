"""Where an exported dense model is from, for ``llmpruner-files.json``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from .base import ExportTask
    from .padded import Padded


def origin_of(task: ExportTask, padded: Padded | None) -> dict[str, Any]:
    """JSON values. ``padded``: None where no zeros were added."""
    from .. import __version__

    origin: dict[str, Any] = {"llmpruner": __version__, "exported_from": str(task.source)}
    if padded is not None:
        origin |= {"padded": {"parameters_before": padded.before, "parameters_after": padded.after}}
    return origin
