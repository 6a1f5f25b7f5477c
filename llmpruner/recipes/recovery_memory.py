"""How models are held while layers are trained one by one, in memory or read from their files, and the disk it takes.

Memory of a training that streams: the largest layer of the pruned model in its dtype, twice, and four times in float32
(weights, gradients, two moments of AdamW); the largest layer of the dense model; what is outside the layers of both;
the activations of one micro-batch in one layer; and hidden states up to their limit.

Disk: the result, the finished layers, the hidden states of both models that are beyond the limit, and the copy of all
of them with which an interrupted run goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import psutil
import torch

from ..errors import SettingsError
from ..models.model import Model
from ..models.numbers import dtype_of, loaded_bytes
from ..models.opening import why_not_streamed
from ..recovery.schedule import micro_batch
from ..settings import LoadSettings, RunSettings
from .fitting import boundary_limit, fitting
from .forecast import LATER, Forecast, Residency, Stage
from .layer_sample import layer_parameters, memory_before, sample_layer

if TYPE_CHECKING:
    from ..models.model import Structure
    from ..plugins.catalog import Catalog
    from ..structure.coupling import CouplingGraph
    from .jobs import RecoverJob

_LOG = logging.getLogger("llmpruner")
_F32 = 4
_COPIES = 4
"""Of the weights of a layer in float32: themselves, their gradients, and the two moments of AdamW."""
_STREAMS = 2
"""Of hidden states: those of the dense and those of the pruned model."""


def refuse_without_layers(job: RecoverJob, run: RunSettings) -> None:
    """Raise `SettingsError` for settings of memory that have no effect on a strategy that holds whole models."""
    for name in ("max_memory",):
        if not job.strategy.by_layer and getattr(run, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise SettingsError(
                f"{flag} has no effect with {job.strategy.label()}, which trains whole models; leave it out"
            )


def arranged_layers(
    job: RecoverJob,
    opened: Structure,
    dense: Structure,
    load: LoadSettings,
    run: RunSettings,
    catalog: Catalog,
    *,
    lengths: Sequence[int],
    whole: str | None,
    shown: bool,
) -> Forecast | Residency:
    """How the models are held: both in memory or both read layer by layer. With ``run.max_memory``, in the first way
    that fits; else in memory where their files take less than half of what is free. With it, or ``shown``, a
    `Forecast`.

    ``lengths``: tokens of the examples. ``whole``: what needs the models in memory. Raises `SettingsError` where
    nothing fits.
    """
    reason = whole or _why_whole(opened, dense, load, catalog)
    if run.max_memory is None:
        size = sum(loaded_bytes(structure, load) for structure in (opened, dense))
        large = size > psutil.virtual_memory().available // 2
        way = Residency(reason is None and large, boundary_limit(run))
        return _Estimate(job, opened, dense, load, catalog, lengths).of(way) if shown else way
    estimate = _Estimate(job, opened, dense, load, catalog, lengths)
    return fitting(
        run, run.max_memory, estimate.of, streams=reason is None, divided=(),
        what=f"training the layers of '{opened.ref}'",
        detail=f"; they cannot be read layer by layer: {reason}" if reason else "",
        advice="lower --micro-batch-size or --cutoff",
    )  # fmt: skip


def _why_whole(opened: Structure, dense: Structure, load: LoadSettings, catalog: Catalog) -> str | None:
    if isinstance(opened, Model):
        return "the pruned model is loaded already"
    for structure in (opened, dense):
        reason = why_not_streamed(structure, catalog, load, cuts=False)
        if reason is not None:
            return f"'{structure.ref}': {reason}"
    return None


def states_bytes(job: RecoverJob, opened: Structure, lengths: Sequence[int]) -> int:
    """Bytes of the hidden states of all examples that are trained on, with those of padding. ``lengths``: tokens of all
    that there are."""
    settings, size = job.settings, micro_batch(job.settings)
    rows = sorted(lengths, reverse=True)
    tokens = sum(rows[first] * len(rows[first : first + size]) for first in range(0, len(rows), size))
    if settings.max_steps is not None and rows:
        taken = -(-settings.max_steps // opened.graph.num_layers) * settings.batch_size
        tokens = tokens * min(taken, len(rows)) // len(rows)
    channels = int(getattr(opened.config.get_text_config(), "hidden_size", 0) or 0)
    return tokens * channels * _F32 * _STREAMS


def layers_disk(graph: CouplingGraph, item: int, states: int, way: Residency) -> int:
    """Bytes that lie on the disk at one time: see above. ``graph``, ``item``: of the pruned model, and bytes of each of
    its values; ``states``: of all hidden states."""
    weights = (graph.total_parameters + sum(layer_parameters(graph))) * item
    return weights + states + max(0, states - way.boundary_memory)


class _Estimate:
    """The parts of the memory that do not depend on how the models are held."""

    def __init__(
        self,
        job: RecoverJob,
        opened: Structure,
        dense: Structure,
        load: LoadSettings,
        catalog: Catalog,
        lengths: Sequence[int],
    ) -> None:
        loaded = opened.model if isinstance(opened, Model) else None
        dtype = loaded.dtype if loaded is not None else dtype_of(opened, load)
        device = loaded.device if loaded is not None else torch.device(load.device)
        self._base = memory_before(loaded)
        self._size = dtype.itemsize
        self._states = states_bytes(job, opened, lengths)
        self._graphs = opened.graph, dense.graph
        settings = job.settings
        tokens = micro_batch(settings) * settings.cutoff
        names = [name for name in dense.graph.shapes if name not in dense.graph.ties]
        self._activations = 0
        try:
            # A layer of the dense model is the largest that a pruned one can be.
            sample = sample_layer(dense.config, dense.graph, torch.float32, device, settings.cutoff, names)
            self._activations = round(sample.backward_bytes.of(tokens))
        except Exception as error:  # an estimate must not keep a model from being trained
            _LOG.debug("no layer of '%s' could be run alone: %s", dense.ref, error)

    def of(self, way: Residency) -> Forecast:
        layers = [layer_parameters(graph) for graph in self._graphs]
        largest = max(layers[0])
        memory = {
            "training of one layer": largest * _COPIES * _F32,
            "activations": self._activations,
            "hidden states": way.boundary_memory,
            "modules and tokenizer": LATER,
        }
        if way.streamed:
            outside = sum(
                graph.total_parameters - sum(found) for graph, found in zip(self._graphs, layers, strict=True)
            )
            # The pruned one twice, as its former weights are kept.
            memory["layers"] = (2 * largest + max(layers[1])) * self._size
            memory["weights outside the layers"] = outside * self._size
        else:
            memory["weights"] = (sum(graph.total_parameters for graph in self._graphs) + largest) * self._size
        disk = layers_disk(self._graphs[0], self._size, self._states, way)
        return Forecast(way, self._base, (Stage("training", memory),), disk)
