"""How a model is held during a command: as a whole, or read from its files layer by layer, by what the `Forecast` of
each way says."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import psutil
import torch

from ..models.model import Model
from ..models.numbers import check_device, dtype_of, loaded_bytes, multiplies_bfloat16_fast
from ..models.opening import why_not_streamed
from ..settings import LoadSettings, RunSettings
from .fitting import boundary_limit, fitting
from .forecast import Forecast, Residency, check_machine
from .forecasting import forecast
from .layer_sample import LayerSample, memory_before, sample_layer
from .work import Work

if TYPE_CHECKING:
    from ..models.model import Structure
    from ..plugins.catalog import Catalog
    from .jobs import PruneJob

_ADVICE = "take fewer or shorter samples, or give --max-memory, with which less may do"

_LOG = logging.getLogger("llmpruner")
_DIVIDED = (2, 4, 8, 16)
"""How many times smaller micro-batches are tried, where nothing else fits."""


def is_streamed(opened: Structure, job: PruneJob | None, load: LoadSettings, catalog: Catalog) -> bool:
    """Whether weights are read layer by layer without a limit of memory: where the whole model takes more than half of
    the free memory, and nothing in ``job`` needs it. ``job``: None for a plan that is replayed. Each process that a
    launcher started on this machine holds the model."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = psutil.virtual_memory().available // 2
    if isinstance(opened, Model) or loaded_bytes(opened, load) * processes <= available:
        return False
    return _why_whole(opened, job, load, catalog) is None


def arranged(
    opened: Structure,
    job: PruneJob | None,
    work: Work,
    load: LoadSettings,
    run: RunSettings,
    catalog: Catalog,
    *,
    whole: str | None = None,
) -> Forecast:
    """The forecast of the way in which the model is held; with ``run.max_memory``, of the first that fits (`fitting`).

    ``whole``: what else needs the model in memory. Reads no weights. Raises
    `SettingsError` where none fits, with what the smallest takes.
    """
    dtype, device = _placed(opened, load, catalog)
    base = memory_before(opened.model if isinstance(opened, Model) and opened.streamed is None else None)
    sample = _sample(opened, work, dtype, device)
    free = psutil.virtual_memory().available
    mixed = dtype == torch.float32 and multiplies_bfloat16_fast(device.type)

    def found(residency: Residency) -> Forecast:
        return forecast(opened, work, dtype, residency, sample, base=base, mixed=mixed, free=free)

    if run.max_memory is None:
        way = found(Residency(whole is None and is_streamed(opened, job, load, catalog), boundary_limit(run)))
        if device.type == "cpu":
            check_machine(f"'{opened.ref}'", way, _ADVICE)
        return way
    reason = whole or _why_whole(opened, job, load, catalog)
    return fitting(
        run, run.max_memory, found, streams=reason is None, divided=_DIVIDED, what=f"'{opened.ref}'",
        detail=f"; it cannot be read layer by layer: {reason}" if reason else "",
        advice="take fewer or shorter samples",
    )  # fmt: skip


def weight_bytes(opened: Structure, load: LoadSettings, catalog: Catalog) -> int:
    """Bytes that the weights take in memory, or would, all of them."""
    dtype, _ = _placed(opened, load, catalog)
    return opened.graph.total_parameters * dtype.itemsize


def _placed(opened: Structure, load: LoadSettings, catalog: Catalog) -> tuple[torch.dtype, torch.device]:
    if isinstance(opened, Model):
        return opened.model.dtype, opened.model.device
    check_device(load.device)
    return dtype_of(opened, load), torch.device(load.device)


def _sample(opened: Structure, work: Work, dtype: torch.dtype, device: torch.device) -> LayerSample | None:
    """None where no layer can be run alone."""
    wanted = work.names if work.gradients else ()
    try:
        return sample_layer(
            opened.config, opened.graph, dtype, device, work.length or 64, sorted(wanted), exact=work.exact
        )
    except Exception as error:  # a forecast must not keep a model from being pruned
        _LOG.debug("no layer of '%s' could be run alone: %s", opened.ref, error)
        return None


def _why_whole(opened: Structure, job: PruneJob | None, load: LoadSettings, catalog: Catalog) -> str | None:
    """Why a model has to be in memory as a whole; None if it need not be."""
    if isinstance(opened, Model):
        return "it is loaded already" if opened.streamed is None else None
    return why_not_streamed(opened, catalog, load) or (None if job is None else _needs_all(job))


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
