"""Estimation: signals → saliency per weight → one score per unit.

All span arithmetic is here, so that a criterion works for every layout. For one span, the saliencies of the
indices that a unit owns are summed, over these indices and over all other axes; a group's spans are then reduced
(sum, mean, max, prod or last) to one score per unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..engine.gradients import signals_of, walk_signals
from ..engine.inputs import stream_statistics
from ..engine.signals import InputStats, ParameterSignals, Signal
from ..errors import ModelError, SelectionError
from ..progress import Progress
from ..structure.coupling import LAYER, CoupledGroup, CouplingGraph
from .base import ImportanceCriterion
from .reductions import reduce_spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.calibration import CalibrationSet


@dataclass(frozen=True)
class Scores:
    """``by_group``: group name → float64 tensor of shape (units,); higher is more important."""

    by_group: Mapping[str, torch.Tensor]


def estimate(
    model: PreTrainedModel,
    graph: CouplingGraph,
    groups: Sequence[CoupledGroup],
    criterion: ImportanceCriterion,
    calibration: CalibrationSet | None,
    *,
    reduction: str = "sum",
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Score every unit of ``groups``. Peak memory beyond the model is one layer's gradients and one micro-batch.

    Raises `ModelError` when weights or scores are not finite.
    """
    if Signal.STREAM in criterion.signals:
        return _layers(model, graph, groups, criterion, calibration, progress or Progress())
    uses = _uses(graph, groups, criterion)
    stream = walk_signals(model, graph, uses, criterion.signals, calibration, seed, progress or Progress())
    return _score(graph, groups, criterion, uses, stream, reduction)


def estimate_from(
    inputs: Mapping[str, InputStats],
    model: PreTrainedModel,
    graph: CouplingGraph,
    groups: Sequence[CoupledGroup],
    criterion: ImportanceCriterion,
    *,
    reduction: str = "sum",
    seed: int = 0,
) -> Scores:
    """`estimate` for a criterion of weights and ``inputs``, where these have been measured (parameter → statistics)."""
    uses = _uses(graph, groups, criterion)
    stream = ((name, signals_of(model, name, None, inputs.get(name), criterion.signals, seed)) for name in uses)
    return _score(graph, groups, criterion, uses, stream, reduction)


def _score(
    graph: CouplingGraph,
    groups: Sequence[CoupledGroup],
    criterion: ImportanceCriterion,
    uses: Mapping[str, Sequence[tuple[CoupledGroup, int]]],
    stream: Iterable[tuple[str, ParameterSignals]],
    reduction: str,
) -> Scores:
    partial: dict[tuple[str, int], torch.Tensor] = {}
    for name, signals in stream:
        saliency: torch.Tensor | None = None
        for group, key in uses[name]:
            whole = _whole_units(criterion, signals, group, key)
            if whole is None:
                saliency = criterion.saliency(signals) if saliency is None else saliency
                whole = _per_unit(saliency, group, key, criterion.signed)
            partial[group.name, key] = whole
    scores = {group.name: _reduce(graph, group, partial, reduction) for group in groups}
    return _finite(scores, criterion)


def _finite(scores: Mapping[str, torch.Tensor], criterion: ImportanceCriterion) -> Scores:
    for name, values in scores.items():
        if not bool(torch.isfinite(values).all()):
            raise ModelError(f"criterion {criterion.name} gives group '{name}' a score that is not a finite number")
    return Scores(scores)


def _layers(
    model: PreTrainedModel,
    graph: CouplingGraph,
    groups: Sequence[CoupledGroup],
    criterion: ImportanceCriterion,
    calibration: CalibrationSet | None,
    progress: Progress,
) -> Scores:
    other = next((group for group in groups if group.kind != LAYER), None)
    if other is not None:
        raise SelectionError(f"criterion {criterion.name} scores whole layers, not '{other.kind}'; use --kinds layer")
    if calibration is None:
        raise ModelError(f"criterion {criterion.name} measures the model at work and needs a calibration set")
    streams = stream_statistics(model, graph.layers, calibration, progress)
    values = torch.tensor([criterion.score_layer(stream) for stream in streams], dtype=torch.float64)
    return _finite({group.name: values for group in groups}, criterion)


def _uses(
    graph: CouplingGraph, groups: Sequence[CoupledGroup], criterion: ImportanceCriterion
) -> dict[str, list[tuple[CoupledGroup, int]]]:
    """Parameter → the (group, span number) that read it; tied parameters once, under the name they are stored by."""
    uses: dict[str, list[tuple[CoupledGroup, int]]] = {}
    for group in groups:
        scored = {span for span in group.spans if criterion.roles is None or span.role in criterion.roles}
        for number, span in enumerate(group.spans):
            if span.parameter not in graph.ties and span in (scored or group.spans):
                uses.setdefault(span.parameter, []).append((group, number))
        for number, name in enumerate(_module_parameters(graph, group)):
            uses.setdefault(name, []).append((group, number))
    return uses


def _module_parameters(graph: CouplingGraph, group: CoupledGroup) -> list[str]:
    return [p for m in group.modules for p in graph.shapes if p.startswith(m + ".") and p not in graph.ties]


def _whole_units(
    criterion: ImportanceCriterion, signals: ParameterSignals, group: CoupledGroup, number: int
) -> torch.Tensor | None:
    if group.modules:
        return None
    span = group.spans[number]
    scores = criterion.score_units(signals, span.axis, _index(group, number, signals.weight.device))
    return None if scores is None else scores.double().cpu()


def _index(group: CoupledGroup, number: int, device: torch.device) -> torch.Tensor:
    owned = group.spans[number].indices(range(group.units))
    return torch.tensor(owned, device=device).view(group.units, -1)


def _per_unit(saliency: torch.Tensor, group: CoupledGroup, number: int, signed: bool) -> torch.Tensor:
    if group.modules:
        per_index = saliency.flatten(1).sum(1) if saliency.dim() > 1 else saliency
        return (per_index if signed else saliency).abs().sum(dtype=torch.float64).cpu()
    span = group.spans[number]
    others = [axis for axis in range(saliency.dim()) if axis != span.axis]
    values = saliency if signed else saliency.abs()
    per_index = values.sum(others, dtype=torch.float64) if others else values.double()
    return per_index.abs()[_index(group, number, per_index.device)].sum(1).cpu()


def _reduce(
    graph: CouplingGraph, group: CoupledGroup, partial: Mapping[tuple[str, int], torch.Tensor], reduction: str
) -> torch.Tensor:
    if not group.modules:
        spans = [partial[group.name, n] for n in range(len(group.spans)) if (group.name, n) in partial]
        return reduce_spans(torch.stack(spans), reduction)
    names = _module_parameters(graph, group)
    of_module = [
        [partial[group.name, n] for n, name in enumerate(names) if name.startswith(module + ".")]
        for module in group.modules
    ]
    return torch.stack([reduce_spans(torch.stack(values), reduction) for values in of_module])
