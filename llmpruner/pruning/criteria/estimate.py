"""From signals to saliencies, and to a score of each unit: sums in one span, reduced over the spans of its group."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ...engine.execution import Execution
from ...engine.signals import ParameterSignals, Signal, UnitAxis, kinds_read
from ...engine.statistics import SignalWalk, stream_statistics, token_statistics
from ...engine.walk import CalibrationSet
from ...errors import ModelError, PluginError, SelectionError
from ...structure.coupling import LAYER, CoupledGroup, CouplingGraph
from ...values import counted
from .base import ImportanceCriterion

_LOG = logging.getLogger("llmpruner")
_ELEMENTS = 1 << 20
"""Of a saliency that are summed at once."""
Scores = Mapping[str, torch.Tensor]
"""Group name → scores of its units, (units,), float64; higher is more important."""


def check_accepted(criterion: ImportanceCriterion, groups: Sequence[CoupledGroup], graph: CouplingGraph) -> None:
    """Raise `SelectionError` for units that ``criterion`` does not score."""
    for group in groups:
        if not criterion.accepts(group.kind):
            kinds = ",".join(kind for kind in graph.kinds if criterion.accepts(kind))
            advice = f"; use --kinds {kinds}" if kinds else ", nor others of this model; choose another criterion"
            raise SelectionError(f"criterion {criterion.name} does not score '{group.kind}' units{advice}")


def estimate(
    model: PreTrainedModel, graph: CouplingGraph, groups: Sequence[CoupledGroup], criterion: ImportanceCriterion,
    calibration: CalibrationSet | None, *, reduction: str = "sum", seed: int = 0, execution: Execution | None = None,
    length: int = 1, removable: frozenset[int] | None = None, tokenizer: Any | None = None,
) -> Scores:  # fmt: skip
    """Score every unit of ``groups``. ``calibration``: None for weights alone. ``length``, ``removable``: as in
    `StreamStats`. Raises `SelectionError` for units that are not scored, `ModelError` for infinite scores."""
    check_accepted(criterion, groups, graph)
    execution, signals = execution or Execution.of(model, graph.layers), criterion.needs
    if calibration is not None and signals & {Signal.STREAM, Signal.STREAM_BLOCKS}:
        of_layers = criterion.score_layers(stream_statistics(execution, calibration, length, removable))
        scores = {group.name: of_layers.cpu().double() for group in groups}
    elif calibration is not None and Signal.TOKENS in signals:
        of_tokens = criterion.score_tokens(token_statistics(execution, calibration, tokenizer))
        scores = {group.name: of_tokens.cpu().double() for group in groups}
    else:
        uses = scored_spans(graph, groups, criterion)
        reads, measure = kinds_read(graph), criterion.measure
        measured = SignalWalk(execution, reads, uses, signals, calibration, seed, measure, criterion.by_matrix)
        scores = _score(groups, criterion, uses, measured, reduction)
    for name, values in scores.items():
        if not bool(torch.isfinite(values).all()):
            raise ModelError(f"criterion {criterion.name} gives group '{name}' a score that is not a finite number")
    # As where a model multiplies with a part of a matrix (DBRX), or by einsum (XLNet), which no product is seen of.
    alike = [name for name, values in scores.items() if len(values) > 1 and bool((values == values[0]).all())]
    if alike and execution.ranks.first:
        _LOG.warning(
            f"criterion {criterion.name} cannot tell the units of {counted(len(alike), 'group')} apart "
            f"('{alike[0]}' …), so the first ones go; choose another criterion, such as taylor"
        )
    return scores


class _Use(NamedTuple):
    """One span of a group; for layers, one parameter of ``layer``. ``number``: of the span, or of the parameter."""

    group: CoupledGroup
    number: int
    axis: UnitAxis
    layer: int | None = None


def _score(
    groups: Sequence[CoupledGroup], criterion: ImportanceCriterion, uses: Mapping[str, Sequence[_Use]],
    stream: Iterable[tuple[str, ParameterSignals]], reduction: str,
) -> dict[str, torch.Tensor]:  # fmt: skip
    partial: dict[tuple[str, int | None], dict[int, torch.Tensor]] = defaultdict(dict)
    sums: dict[tuple[str, int], tuple[_Use, torch.Tensor]] = {}
    for name, signals in stream:
        saliency: torch.Tensor | None = None
        for use in uses[name]:
            key = use.group.name, use.number
            if signals.matrix is None:
                scores = criterion.score_units(signals, use.axis, _index(use, signals.weight))
                if scores is not None:
                    partial[use.group.name, use.layer][use.number] = scores.cpu().double()
                    continue
            if saliency is None:
                saliency = criterion.saliency(signals)
                shape, expected = getattr(saliency, "shape", type(saliency).__name__), signals.weight.shape
                if shape != expected:
                    shape = shape if isinstance(shape, str) else tuple(shape)
                    raise PluginError(f"{criterion.label()} gave {shape} for {name}; expected shape {tuple(expected)}")
            per_index = _per_index(saliency, use, criterion.signed).cpu()
            if key in sums:
                # Matrices of a stack add up, or follow one another where the units are the matrices.
                _, before = sums[key]
                follows = use.axis.axis == 0 and use.group.kind != LAYER
                per_index = torch.cat([before, per_index]) if follows else before + per_index
            sums[key] = use, per_index
    for use, values in sums.values():
        scores = values if use.group.kind == LAYER else values.abs()[_index(use, values)].sum(1)
        partial[use.group.name, use.layer][use.number] = scores
    reduced = {}
    for group in groups:
        layers: Iterable[int | None] = range(group.units) if group.kind == LAYER else (None,)
        parts = [dict(sorted(partial[group.name, layer].items())) for layer in layers]
        reduced[group.name] = torch.cat([reduce_spans(torch.stack([*part.values()]), reduction) for part in parts])
    return reduced


def scored_spans(
    graph: CouplingGraph, groups: Sequence[CoupledGroup], criterion: ImportanceCriterion
) -> dict[str, list[_Use]]:
    """Parameter → the spans that are scored; tied parameters are under the name they are stored by."""
    uses: dict[str, list[_Use]] = {}
    reads = kinds_read(graph)
    for group in groups:
        spans = [
            (span.parameter, _Use(group, n, UnitAxis(group.kind, span.role, span.axis, reads[span.parameter])))
            for n, span in enumerate(group.spans)
            if span.parameter not in graph.ties
        ]
        scored = [(name, use) for name, use in spans if criterion.counts(use.axis)]
        for name, use in scored or spans:
            uses.setdefault(name, []).append(use)
        for number, name in enumerate(graph.shapes if group.kind == LAYER else ()):
            if name in reads and graph.is_decoder(name):
                axis = UnitAxis(group.kind, None, 0, reads[name])
                uses.setdefault(name, []).append(_Use(group, number, axis, graph.layer_of(name)))
    return uses


def _index(use: _Use, weight: torch.Tensor) -> torch.Tensor:
    """The indices on the axis that each unit owns, (units, width)."""
    if use.group.kind == LAYER:
        return torch.arange(weight.shape[0] if weight.dim() else 1, device=weight.device)[None]
    units = use.group.units
    owned = use.group.spans[use.number].indices(range(units))
    return torch.tensor(owned, device=weight.device).view(units, -1)


def _per_index(saliency: torch.Tensor, use: _Use, signed: bool) -> torch.Tensor:
    """Sums of saliencies over all axes but that of the units, float64; for layers one sum, (1,)."""
    if use.group.kind == LAYER:
        per_index = saliency.flatten(1).sum(1) if saliency.dim() > 1 else saliency
        return (per_index if signed else saliency).abs().sum(dtype=torch.float64).view(1)
    others = [axis for axis in range(saliency.dim()) if axis != use.axis.axis]
    if not others:
        return (saliency if signed else saliency.abs()).double()
    # A few rows at a time, as both the absolute values and torch's sum in float64 are copies.
    parts = torch.split(saliency, max(1, _ELEMENTS * len(saliency) // max(1, saliency.numel())))
    sums = [(part if signed else part.abs()).sum(others, dtype=torch.float64) for part in parts]
    return torch.cat(sums) if use.axis.axis == 0 else torch.stack(sums).sum(0)


def reduce_spans(scores_PU: torch.Tensor, reduction: str) -> torch.Tensor:
    """Scores (S, U) reduced over spans to (U,). ``last``: of the last span, as in LLM-Pruner's code. ``prod``: the
    geometric mean, which orders units as LLM-Pruner's product does, but is neither zero nor infinite for many spans."""
    if reduction == "last":
        return scores_PU[-1]
    if reduction == "max":
        return scores_PU.amax(0)
    if reduction == "prod":
        return scores_PU.abs().log().mean(0).exp() * scores_PU.sign().prod(0)
    reduced: torch.Tensor = getattr(scores_PU, reduction)(0)  # sum or mean
    return reduced
