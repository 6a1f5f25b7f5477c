"""From components of tied identities to sets of alike units, and from traced layers to groups of all layers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from os.path import commonprefix
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..models.meta import graph_of, meta_model
from ..structure.coupling import (
    ATTENTION,
    EXPERT,
    HIDDEN,
    LATENT,
    LAYER,
    MLP,
    QUERY,
    VOCABULARY,
    Blocked,
    CoupledGroup,
    CouplingGraph,
    Role,
    Span,
    in_layer,
    index_map,
    layer_number,
)
from . import operators_math, operators_shape  # noqa: F401  (they register their rules)
from .propagate import Flags, Ids, Mark, Propagation, uniform
from .trace import Trace, trace

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..models.family import ModelFamily

_CROSS_LAYER = "cross-layer"
"""Channels of several layers that are not the residual stream; they become no group."""

Slot = tuple[str, int]
"""A parameter and one of its axes."""


@dataclass(frozen=True)
class UnitSet:
    """Units of a traced ``layer`` (None: across layers) that own equally many indices of the same axes of tensors."""

    kind: str
    layer: int | None
    units: int
    spans: tuple[Span, ...]
    buffers: tuple[Span, ...]
    marks: frozenset[Mark]
    blocks: int
    minimum: int

    @property
    def module(self) -> str:
        """The path of the module that contains all parameters."""
        return ".".join(commonprefix([s.parameter.split(".")[:-1] for s in self.spans]))  # noqa: RUF071  (of lists)


def build_graph(family: ModelFamily, config: PreTrainedConfig) -> CouplingGraph:
    """The coupling graph of a dense model, without weights. Raises `CouplingError` where groups contradict shapes."""
    declared = family.coupled_groups(config)
    return discover_graph(config) if declared is None else graph_of(meta_model(config), declared)


def discover_graph(config: PreTrainedConfig) -> CouplingGraph:
    """The coupled groups of a model of ``config``, and why other axes have none. Raises `UnsupportedModelError`."""
    traced = trace(config)
    sets, reasons = _unit_sets_of(traced)
    is_shallow = any(len(members) > 1 for members in traced.stands_for.values())
    if is_shallow and any(each.kind == _CROSS_LAYER for each in sets):
        # Something couples several layers, so one traced layer does not represent the others.
        traced = trace(config, shallow=False)
        sets, reasons = _unit_sets_of(traced)
    model = meta_model(config)
    whole = graph_of(model, ())
    groups = list(_groups([each for each in sets if each.kind != _CROSS_LAYER], traced, whole.ties))
    table = _table_of_layers(model, traced.layers)
    stay = f"'{table}' has a part for every layer, which does not follow" if table else traced.stay
    if not stay:
        groups.append(CoupledGroup("layers", LAYER, whole.num_layers))
    blocked = [Blocked(traced.layers, 0, stay)] if stay else []
    for (parameter, axis), reason in reasons.items():
        blocked += [Blocked(name, axis, reason) for name in _everywhere(parameter, traced)]
    return replace(whole, groups=tuple(groups), blocked=tuple(blocked))


def _unit_sets_of(traced: Trace) -> tuple[list[UnitSet], dict[Slot, str]]:
    """The unit sets of a traced model, and axis → reason for the axes that belong to none."""
    ties = graph_of(traced.model, ()).ties
    rigid, elastic = Propagation(), Propagation(elastic=True)
    for run in (rigid, elastic):
        run.run(traced.program, ties)
    sets, reasons = unit_sets(rigid, traced.layers)
    for each in unit_sets(elastic, traced.layers)[0]:
        if each.units > each.blocks > 1 and each.layer is not None and each.marks & {Mark.ROUTED, Mark.ATTENDS}:
            sets.append(each if Mark.ROUTED in each.marks else replace(each, kind=QUERY))
    offered = {(s.parameter, s.axis) for each in sets for s in each.spans}
    return _latent(sets, traced.layers), {slot: why for slot, why in reasons.items() if slot not in offered}


def unit_sets(run: Propagation, layers: str) -> tuple[list[UnitSet], dict[Slot, str]]:
    """The sets of units that can be silenced, and so checked; and axis → reason, for axes without removable units."""
    parts = components(run)
    closed = parts.marked[Mark.BLOCKED] | (parts.marked[Mark.SOFTMAX] & ~parts.marked[Mark.ROUTED])
    reasons = {}
    for slot, ids in run.parameters.items():
        roots = parts.label[ids]
        if slot[0] not in run.buffers and len(ids) and closed[roots].all():
            reasons[slot] = parts.reasons.get(int(roots[0]), "a softmax runs over it")
    # The open indices of all slots, as three arrays, sorted by component, slot and index.
    slots, axes = list(run.parameters), list(run.parameters.values())
    roots = parts.label[np.concatenate(axes)]
    owner = np.concatenate([uniform(len(ids), number) for number, ids in enumerate(axes)])
    index = np.concatenate([np.arange(len(ids)) for ids in axes])
    order = np.lexsort((index, owner, roots))
    order = order[~closed[roots[order]]]
    roots, owner, index = roots[order], owner[order], index[order]
    offsets = {int(i): offset for ids, offset in run.offsets for i in ids[ids >= 0].tolist()}
    sets = []
    by_pattern = _by_pattern(roots, owner, parts).items()
    for (blocks, pattern), members in ((key, members) for key, members in by_pattern if len(members) > 1):
        matrix = np.stack([index[a:b] for a, b in members])
        matrix = matrix[np.argsort(matrix[:, 0], kind="stable")]
        spans: list[Span] = []
        column = 0
        for number, width in pattern:
            name, axis = slots[number]
            first = int(run.parameters[name, axis][matrix[0, column]])
            is_norm, is_consumed = (run.marked[mark][first] for mark in (Mark.RMS, Mark.CONSUMED))
            role = Role.NORM if is_norm else Role.CONSUMES if is_consumed else Role.PRODUCES
            rows = matrix[:, column : column + width]
            column += width
            # One span for every run of columns in which the indices of all units are consecutive.
            breaks = np.flatnonzero((np.diff(rows, axis=1) != 1).any(axis=0)) + 1
            for part in np.split(rows, breaks, axis=1):
                spans.append(Span(name, axis, role, index_map(part.tolist()), offsets.get(first, 0.0)))
        root = int(roots[members[0][0]])
        marks = frozenset(m for m in Mark if parts.marked[m][root])
        weights = tuple(s for s in spans if s.parameter not in run.buffers)
        buffers = tuple(s for s in spans if s.parameter in run.buffers)
        if weights and (marks & {Mark.ROUTED, Mark.VOCABULARY} or any(s.role is Role.CONSUMES for s in weights)):
            kind, minimum = _kind(weights, marks, layers), parts.minimum.get(root, 1)
            sets.append(UnitSet(*kind, len(members), weights, buffers, marks, blocks, minimum))
    return sets, reasons


@dataclass(frozen=True)
class Components:
    """``label``: identity → root of its component. ``marked[mark][root]``: whether a member has the mark. ``reasons``:
    root → why it is blocked. ``blocks``: root → number of equal blocks. ``minimum``: root → how many units stay."""

    label: Ids
    marked: dict[Mark, Flags]
    reasons: dict[int, str]
    blocks: dict[int, int]
    minimum: dict[int, int]


def components(run: Propagation) -> Components:
    label = connected_components(run.count, run.edges)

    def roots(ids: Ids) -> list[int]:
        return [int(root) for root in np.unique(label[ids[ids >= 0]])]

    marked = {mark: np.zeros(run.count, dtype=bool) for mark in Mark}
    for mark, flags in run.marked.items():
        marked[mark][label[flags[: run.count]]] = True
    reasons = {root: reason for ids, reason in reversed(run.reasons) for root in roots(ids)}  # the first counts
    blocks = {root: n for ids, n in run.blocks for root in roots(ids)}
    minimum = {root: n for ids, n in sorted(run.minimum, key=itemgetter(1)) for root in roots(ids)}  # the largest
    return Components(label, marked, reasons, blocks, minimum)


def connected_components(count: int, edges: list[tuple[Ids, Ids]]) -> Ids:
    """Smallest member of the component of every node, by hooking and pointer jumping."""
    label = np.arange(count, dtype=np.int64)
    a, b = map(np.concatenate, zip(*edges, strict=True)) if edges else (label, label)
    while (differ := label[a] != label[b]).any():
        low, high = np.minimum(label[a], label[b]), np.maximum(label[a], label[b])
        np.minimum.at(label, high[differ], low[differ])
        while (label != (jumped := label[label])).any():
            label = jumped
    return label


def _by_pattern(
    roots: Ids, owner: Ids, parts: Components
) -> dict[tuple[int, tuple[tuple[int, int], ...]], list[tuple[int, int]]]:
    """(number of blocks, pairs of slot and number of indices) → components, as ranges of the arrays."""
    if not len(roots):
        return {}
    pair = np.flatnonzero(np.r_[True, (np.diff(roots) != 0) | (np.diff(owner) != 0)])
    runs = zip(roots[pair].tolist(), owner[pair].tolist(), np.diff(np.r_[pair, len(roots)]).tolist(), strict=True)
    ranges: dict[tuple[int, tuple[tuple[int, int], ...]], list[tuple[int, int]]] = {}
    stop = 0
    for root, of_root in itertools.groupby(runs, key=itemgetter(0)):
        pattern = tuple((slot, size) for _, slot, size in of_root)
        start, stop = stop, stop + sum(size for _, size in pattern)
        ranges.setdefault((parts.blocks.get(root, 1), pattern), []).append((start, stop))
    return ranges


def _kind(spans: Sequence[Span], marks: frozenset[Mark], layers: str) -> tuple[str, int | None]:
    """The kind of a unit set, and the number of its traced layer."""
    if Mark.VOCABULARY in marks:
        return VOCABULARY, None
    # The units of a head own neighbouring indices, unlike channels that lie in several matrices of one parameter.
    heads = {(s.parameter, s.axis) for s in spans if s.index.width > 1}
    numbers = {layer_number(s.parameter, layers) for s in spans}
    if None in numbers:
        # A table of biases that all layers look up couples the heads of all of them.
        return ATTENTION if Mark.ATTENDS in marks and heads else HIDDEN, None
    if len(numbers) > 1:
        return _CROSS_LAYER, None
    (layer,) = numbers
    if Mark.ROUTED in marks:
        return EXPERT, layer
    if Mark.ATTENDS in marks or heads == {(s.parameter, s.axis) for s in spans}:
        return ATTENTION, layer
    # A head without attention, with numbers of its own beside channels, is one of a state space model.
    consumed = {(s.parameter, s.axis) for s in spans if s.role is Role.CONSUMES}
    return LATENT if consumed <= heads else MLP, layer


def _latent(sets: list[UnitSet], layers: str) -> list[UnitSet]:
    """``sets``, with channels inside an attention module of kind `LATENT` instead of `MLP`."""
    attention = [s for s in sets if s.kind == ATTENTION and s.layer is not None and Mark.ATTENDS in s.marks]
    # Where a whole layer is one flat module, the paths do not separate its parts.
    inside = tuple(f"{s.module}." for s in attention if s.module != f"{layers}.{s.layer}")
    return [replace(s, kind=LATENT) if s.kind == MLP and f"{s.module}.".startswith(inside) else s for s in sets]


def _groups(sets: Iterable[UnitSet], traced: Trace, ties: Mapping[str, str]) -> Iterator[CoupledGroup]:
    """Coupled groups of the real model, layer by layer, then those of all layers. ``ties``: see `CouplingGraph`."""
    by_layer: dict[int | None, list[UnitSet]] = {}
    for each in sets:
        by_layer.setdefault(each.layer, []).append(each)
    traced_as = {number: traced_number for traced_number, real in traced.stands_for.items() for number in real}
    order = (ATTENTION, MLP, QUERY, EXPERT, LATENT)
    for number in sorted(traced_as):
        members = sorted(by_layer.get(traced_as[number], []), key=lambda each: order.index(each.kind))
        for name, each in zip(_names(members, traced), members, strict=True):
            yield _group(name, each, number, traced)
    count: Counter[str] = Counter()
    for each in sorted(by_layer.get(None, []), key=lambda each: (each.kind == VOCABULARY, -each.units)):
        name = f"{each.kind}.{count[each.kind]}" if count[each.kind] else each.kind
        count[each.kind] += 1
        yield _group(name, replace(each, spans=tuple(_with_ties(each.spans, ties))), None, traced)


def _group(word: str, each: UnitSet, layer: int | None, traced: Trace) -> CoupledGroup:
    def real(spans: Iterable[Span]) -> tuple[Span, ...]:
        return tuple(replace(s, parameter=p) for s in spans for p in _everywhere(s.parameter, traced, layer))

    blocks = each.blocks if each.units % each.blocks == 0 else 1
    # As many experts as are chosen at a time must stay, even where all of them come from one block.
    minimum = blocks * (each.minimum if Mark.ROUTED in each.marks else 1)
    multiple = 1
    complex_numbers = (n.target is torch.ops.aten.view_as_complex.default for n in traced.program.graph.nodes)
    if each.kind == LATENT and each.units % 2 == 0 and any(complex_numbers):
        multiple = 2  # what lies next to the units in one row is read as complex numbers
    elif any(s.axis > 0 and traced.model.get_parameter(s.parameter).ndim == 3 for s in each.spans):
        # Grouped matrix products over experts need rows of a multiple of 16 bytes, 8 numbers of 16 bits.
        multiple = next(n for n in (8, 4, 2, 1) if each.units % n == 0)
    spans, buffers = real(each.spans), real(each.buffers)
    return CoupledGroup(word, each.kind, each.units, spans, blocks, minimum, multiple, buffers, layer)


def _with_ties(spans: Iterable[Span], ties: Mapping[str, str]) -> Iterator[Span]:
    """The spans under all names of their parameters."""
    for span in spans:
        aliases = [alias for alias, name in ties.items() if name == span.parameter]
        # A tied parameter produces as embedding and consumes as head.
        tied = bool(aliases) and span.axis == 1
        yield replace(span, role=Role.PRODUCES) if tied else span
        for alias in aliases:
            yield replace(span, parameter=alias, role=Role.CONSUMES if tied else span.role)


def _names(members: Sequence[UnitSet], traced: Trace) -> list[str]:
    """Names within a layer: the kind, with the module where it has several groups of the kind."""
    count = Counter(each.kind for each in members)
    same: Counter[str] = Counter()
    names = []
    for each in members:
        name = "experts" if each.kind == EXPERT else each.kind
        if count[each.kind] > 1:
            module = each.module.removeprefix(f"{traced.layers}.{each.layer}").strip(".")
            name = f"{name}.{module}" if module else name
        same[name] += 1
        names.append(f"{name}#{same[name]}" if same[name] > 1 else name)
    return names


def _everywhere(parameter: str, traced: Trace, layer: int | None = None) -> list[str]:
    """The names of a traced parameter in ``layer``; None: in all layers that its traced layer represents."""
    number = layer_number(parameter, traced.layers)
    numbers = [0] if number is None else traced.stands_for[number] if layer is None else [layer]
    return [in_layer(parameter, traced.layers, n) for n in numbers]


def _table_of_layers(model: PreTrainedModel, layers: str) -> str | None:
    """The name of a parameter outside ``layers`` with a part for each: embeddings that it is given in every layer."""
    size = getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None) or 0
    every = len(model.get_submodule(layers)) * size
    outside = ((name, p.shape) for name, p in model.named_parameters() if not name.startswith(f"{layers}."))
    return next((name for name, shape in outside if every and every in shape), None)
