"""Whether a model is loaded as a whole, or read from its files layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil

from ..errors import SettingsError
from ..loading.model import file_bytes, why_not_streamed
from ..settings import LoadSettings, RunSettings

if TYPE_CHECKING:
    from ..loading.model import Structure
    from ..plugins.catalog import Catalog
    from .jobs import PruneJob


def is_streamed(
    opened: Structure, job: PruneJob | None, load: LoadSettings, run: RunSettings, catalog: Catalog
) -> bool:
    """Whether weights are read layer by layer: where the whole model would take more than ``run.max_memory``, or more
    than half of the free memory, and nothing in ``job`` needs the whole model. ``job``: None for a plan that is
    replayed.

    Raises `SettingsError` where ``run.max_memory`` needs it, and it cannot be done.
    """
    size = file_bytes(opened)
    if size <= (run.max_memory or psutil.virtual_memory().available) // 2:
        return False
    reason = why_not_streamed(opened.ref, catalog, load, opened) or (None if job is None else _needs_all(job))
    if reason is not None and run.max_memory is not None:
        raise SettingsError(
            f"--max-memory: the weights of '{opened.ref}' take {size:,} bytes as a whole, and cannot be read layer by "
            f"layer: {reason}"
        )
    return reason is None


def _needs_all(job: PruneJob) -> str | None:
    """What in a job needs the whole model in memory; None if nothing does."""
    if job.steps > 1:
        return "--steps cuts copies of the model"
    if job.allocation.measures:
        return f"{job.allocation.label()} runs copies of the model"
    if not job.budget.from_shapes:
        return f"{job.budget.label()} measures the model"
    if job.compensation.reads_text and not job.compensation.by_layer:
        return f"{job.compensation.label()} changes weights of the whole model"
    return None
