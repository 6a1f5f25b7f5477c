"""How a model is held during a command: as a whole, or read from its files layer by layer, by what the `Forecast` of
each way says."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import inf
from typing import TYPE_CHECKING

import psutil
import torch

from ..engine.boundaries import DEFAULT_LIMIT
from ..errors import SettingsError
from ..loading.model import Model, conversion_rate, dtype_of, loaded_bytes, why_not_streamed
from ..models.devices import check_device
from ..models.precision import multiplies_bfloat16_fast
from ..settings import LoadSettings, RunSettings
from .forecast import Forecast, Residency, check_machine, size_text
from .forecasting import forecast
from .layer_sample import LayerSample, memory_before, sample_layer
from .work import Work

if TYPE_CHECKING:
    from ..loading.model import Structure
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
    if isinstance(opened, Model) or loaded_bytes(opened, catalog, load) * processes <= available:
        return False
    return _why_whole(opened, job, load, catalog) is None


def computed_once(opened: Structure, load: LoadSettings, catalog: Catalog, room: int | None) -> bool:
    """Whether a model that is read layer by layer has its weights, where they are computed of what is stored, in files
    beside the result after they were computed once. ``room``: bytes of disk that are free there; None without a result.

    It is so where the files fit into free memory, in which the system keeps them; a disk gives them no faster than they
    are computed. Three times their size must be free: for them, the result, and weights that are fitted.
    """
    size = loaded_bytes(opened, catalog, load)
    if isinstance(opened, Model) or room is None or room < 3 * size or psutil.virtual_memory().available < size:
        return False
    return conversion_rate(opened, catalog, load) not in (None, inf)


def arranged(
    opened: Structure,
    job: PruneJob | None,
    work: Work,
    load: LoadSettings,
    run: RunSettings,
    catalog: Catalog,
    *,
    whole: str | None = None,
    room: int | None = None,
) -> Forecast:
    """The forecast of the way in which the model is held. With ``run.max_memory``, it is the first that fits of: in
    memory, layer by layer, each with the usual and with less memory for hidden states; layer by layer with smaller
    micro-batches.

    ``whole``: what else needs the model in memory. ``room``: see `computed_once`. Reads no weights. Raises
    `SettingsError` where none fits, with what the smallest takes.
    """
    dtype, device = _placed(opened, load, catalog)
    base = memory_before(opened.model if isinstance(opened, Model) and opened.streamed is None else None)
    sample = _sample(opened, work, dtype, device)
    free = psutil.virtual_memory().available
    mixed = dtype == torch.float32 and multiplies_bfloat16_fast(device.type)

    @cache
    def converting() -> float | None:
        return conversion_rate(opened, catalog, load)

    @cache
    def once() -> bool:
        return computed_once(opened, load, catalog, room)

    def found(residency: Residency) -> Forecast:
        residency = replace(residency, once=residency.streamed and once())
        rate = converting() if residency.streamed else None
        return forecast(
            opened, work, dtype, residency, sample, base=base, mixed=mixed, converting=rate, free=free
        )  # fmt: skip

    limit = DEFAULT_LIMIT if run.boundary_memory is None else run.boundary_memory
    if run.max_memory is None:
        way = found(Residency(whole is None and is_streamed(opened, job, load, catalog), limit))
        if device.type == "cpu":
            check_machine(f"'{opened.ref}'", way, _ADVICE)
        return way
    reason = whole or _why_whole(opened, job, load, catalog)
    tried = [found(way) for way in _ways(limit, fixed=run.boundary_memory is not None, streams=reason is None)]
    for one in tried:
        if one.memory <= run.max_memory:
            return one
        spare = run.max_memory - one.memory + one.residency.boundary_memory
        if run.boundary_memory is None and one.residency.divided == 1 and 0 < spare < limit:
            less = found(Residency(one.residency.streamed, spare))
            if less.memory <= run.max_memory:
                return less
    least = min(tried, key=lambda one: one.memory)
    detail = f"; it cannot be read layer by layer: {reason}" if reason else ""
    raise SettingsError(
        f"--max-memory {size_text(run.max_memory)}: '{opened.ref}' needs at least {size_text(least.memory)} "
        f"({size_text(least.base)} before it starts; {least.largest_parts}){detail}; raise it, "
        "or take fewer or shorter samples"
    )


def _ways(limit: int, *, fixed: bool, streams: bool) -> Iterator[Residency]:
    for streamed in (False, True) if streams else (False,):
        yield Residency(streamed, limit)
        if not fixed:
            yield Residency(streamed, 0)
    for divided in _DIVIDED:
        yield Residency(streams, limit if fixed else 0, divided)


def _placed(opened: Structure, load: LoadSettings, catalog: Catalog) -> tuple[torch.dtype, torch.device]:
    if isinstance(opened, Model):
        return opened.model.dtype, opened.model.device
    check_device(load.device)
    return dtype_of(opened, catalog, load), torch.device(load.device)


def _sample(opened: Structure, work: Work, dtype: torch.dtype, device: torch.device) -> LayerSample | None:
    """None where no layer can be run alone."""
    wanted = work.names if work.gradients else ()
    try:
        return sample_layer(opened.config, opened.graph, dtype, device, work.length or 64, sorted(wanted))
    except Exception as error:  # a forecast must not keep a model from being pruned
        _LOG.debug("no layer of '%s' could be run alone: %s", opened.ref, error)
        return None


def _why_whole(opened: Structure, job: PruneJob | None, load: LoadSettings, catalog: Catalog) -> str | None:
    """Why a model has to be in memory as a whole; None if it need not be."""
    if isinstance(opened, Model):
        return "it is loaded already" if opened.streamed is None else None
    return why_not_streamed(opened.ref, catalog, load, opened) or (None if job is None else _needs_all(job))


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
