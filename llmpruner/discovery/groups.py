"""From a configuration to the coupled groups of all layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    layer_number,
)
from . import operators_math, operators_shape  # noqa: F401  (they register their rules)
from .ids import Mark
from .propagate import Propagation
from .trace import Trace, trace
from .units import OwnedAxis, UnitSet, unit_sets

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .family import ModelFamily


_CROSS_LAYER = "cross-layer"
"""Channels shared by several layers that are not the residual stream; not made a coupled group."""

_ORDER = (ATTENTION, MLP, QUERY, EXPERT, LATENT)


@dataclass(frozen=True)
class Named:
    """A unit set with its kind. ``layer``: number of the traced layer, None for the residual stream."""

    kind: str
    layer: int | None
    unit_set: UnitSet


def discover_graph(config: PreTrainedConfig) -> CouplingGraph:
    """The coupled groups of a model of ``config``, and the reason of every axis that belongs to none. Raises
    `UnsupportedModelError` when it cannot be traced."""
    traced = trace(config)
    named, reasons = _named(traced)
    is_shallow = any(len(members) > 1 for members in traced.stands_for.values())
    if is_shallow and any(n.kind == _CROSS_LAYER for n in named):
        # Something couples several layers, so one traced layer does not represent the others.
        traced = trace(config, shallow=False)
        named, reasons = _named(traced)
    model = meta_model(config)
    whole = graph_of(model, ())
    groups = list(_groups([n for n in named if n.kind != _CROSS_LAYER], traced, whole.ties))
    if traced.repeats:
        stay = "a layer runs more than once"
    elif table := _table_of_layers(model, traced.layers):
        stay = f"'{table}' has a part for every layer, which does not follow"
    elif traced.streams > 1:
        stay = "layers are given more than the residual stream"
    else:
        stay = ""
        groups.append(CoupledGroup("layers", LAYER, whole.num_layers))
    blocked = [Blocked(traced.layers, 0, stay)] if stay else []
    blocked += [
        Blocked(name, axis, reason)
        for (parameter, axis), reason in reasons.items()
        for name in _everywhere(parameter, traced)
    ]
    return replace(whole, groups=tuple(groups), blocked=tuple(blocked))


def _named(traced: Trace) -> tuple[list[Named], dict[tuple[str, int], str]]:
    ties = graph_of(traced.model, ()).ties
    rigid, reasons = _pass(traced, ties)
    found = [_name(f, traced) for f in rigid if f.units > 1]
    elastic, _ = _pass(traced, ties, elastic=True)
    for unit_set in elastic:
        if unit_set.blocks > 1 and unit_set.units > unit_set.blocks:
            named = _name(unit_set, traced)
            if named.layer is not None and Mark.ROUTED in unit_set.marks:
                found.append(named)
            elif named.layer is not None and Mark.ATTENDS in unit_set.marks:
                found.append(replace(named, kind=QUERY))
    offered = {(s.parameter, s.axis) for n in found for s in n.unit_set.owned}
    return _latent(found, traced.layers), {slot: why for slot, why in reasons.items() if slot not in offered}


def _pass(
    traced: Trace, ties: Mapping[str, str], *, elastic: bool = False
) -> tuple[list[UnitSet], dict[tuple[str, int], str]]:
    """The tokens, and the sets of units that a weight consumes or a router chooses: others cannot be silenced, and so
    not checked."""
    run = Propagation(elastic)
    run.run(traced.program, ties)
    usable, reasons = unit_sets(run)
    known = {Mark.ROUTED, Mark.VOCABULARY}
    return [f for f in usable if f.marks & known or any(s.role is Role.CONSUMES for s in f.owned)], reasons


def _name(unit_set: UnitSet, traced: Trace) -> Named:
    if Mark.VOCABULARY in unit_set.marks:
        return Named(VOCABULARY, None, unit_set)
    numbers = {layer_number(s.parameter, traced.layers) for s in unit_set.owned}
    if len(numbers) > 1 or None in numbers:
        if None not in numbers:
            return Named(_CROSS_LAYER, None, unit_set)
        # A table of biases that all layers look up couples the heads of all of them.
        attends = Mark.ATTENDS in unit_set.marks and any(map(_is_head, unit_set.owned))
        return Named(ATTENTION if attends else HIDDEN, None, unit_set)
    (layer,) = numbers
    if Mark.ROUTED in unit_set.marks:
        return Named(EXPERT, layer, unit_set)
    heads = [_is_head(s) for s in unit_set.owned]
    if Mark.ATTENDS in unit_set.marks or all(heads):
        return Named(ATTENTION, layer, unit_set)
    # A head without attention, with numbers of its own beside channels, is one of a state space model.
    consumed = [head for head, s in zip(heads, unit_set.owned, strict=True) if s.role is Role.CONSUMES]
    return Named(LATENT if all(consumed) else MLP, layer, unit_set)


def _is_head(owned: OwnedAxis) -> bool:
    """Whether each unit owns neighbouring indices, unlike a channel that lies in several matrices of one parameter."""
    return bool((np.diff(owned.rows, axis=1) == 1).any())


def _latent(found: list[Named], layers: str) -> list[Named]:
    """``found``, with channels inside an attention module renamed from `MLP` to `LATENT`."""
    attention = {
        (n.layer, _common_module(n.unit_set)) for n in found if n.kind == ATTENTION and Mark.ATTENDS in n.unit_set.marks
    }
    # Where a whole layer is one flat module, the paths do not separate its parts.
    attention = {(layer, path) for layer, path in attention if path != f"{layers}.{layer}"}
    return [
        replace(n, kind=LATENT)
        if n.kind == MLP
        and any(n.layer == at and f"{_common_module(n.unit_set)}.".startswith(f"{path}.") for at, path in attention)
        else n
        for n in found
    ]


def _common_module(unit_set: UnitSet) -> str:
    return ".".join(commonprefix([s.parameter.split(".")[:-1] for s in unit_set.owned]))  # noqa: RUF071  (of lists)


def _groups(sets: Iterable[Named], traced: Trace, ties: Mapping[str, str]) -> Iterator[CoupledGroup]:
    """Coupled groups of the real model, layer by layer, then those of all layers. ``ties``: see `CouplingGraph`."""
    by_layer: dict[int | None, list[Named]] = {}
    for named in sets:
        by_layer.setdefault(named.layer, []).append(named)
    real = {m: traced_number for traced_number, members in traced.stands_for.items() for m in members}
    for number in sorted(real):
        members = sorted(by_layer.get(real[number], []), key=lambda n: _ORDER.index(n.kind))
        for name, named in zip(_names(members, traced), members, strict=True):
            yield _group(f"layers.{number}.{name}", named, number, traced, {})
    tied = {name: [name, *(alias for alias, first in ties.items() if first == name)] for name in ties.values()}
    count: Counter[str] = Counter()
    for named in sorted(by_layer.get(None, []), key=lambda n: (n.kind == VOCABULARY, -n.unit_set.units)):
        name = f"{named.kind}.{count[named.kind]}" if count[named.kind] else named.kind
        count[named.kind] += 1
        yield _group(name, named, None, traced, tied)


def _group(
    name: str, named: Named, layer: int | None, traced: Trace, tied: Mapping[str, Sequence[str]]
) -> CoupledGroup:
    unit_set = named.unit_set
    spans, buffers = (
        tuple(
            replace(span, parameter=parameter)
            for span in _spans(owned, tied)
            for parameter in (
                _everywhere(span.parameter, traced)
                if layer is None
                else [in_layer(span.parameter, traced.layers, layer)]
            )
        )
        for owned in (unit_set.owned, unit_set.buffers)
    )
    blocks = unit_set.blocks if unit_set.units % unit_set.blocks == 0 else 1
    # As many experts as are chosen at a time must stay, even where all of them come from one block.
    minimum = blocks * (unit_set.minimum if Mark.ROUTED in unit_set.marks else 1)
    multiple = 1
    complex_numbers = (n.target is torch.ops.aten.view_as_complex.default for n in traced.program.graph.nodes)
    if named.kind == LATENT and unit_set.units % 2 == 0 and any(complex_numbers):
        multiple = 2  # what lies next to the units in one row is read as complex numbers
    elif any(s.axis > 0 and traced.model.get_parameter(s.parameter).ndim == 3 for s in unit_set.owned):
        # Grouped matrix products over experts need rows of a multiple of 16 bytes, 8 numbers of 16 bits.
        multiple = next(n for n in (8, 4, 2, 1) if unit_set.units % n == 0)
    return CoupledGroup(name, named.kind, unit_set.units, spans, blocks, minimum, multiple, buffers)


def _spans(owned: Iterable[OwnedAxis], tied: Mapping[str, Sequence[str]]) -> Iterator[Span]:
    for each in owned:
        names = tied.get(each.parameter, [each.parameter])
        for name in names:
            role = each.role
            if len(names) > 1 and each.axis == 1:
                # A tied parameter produces as embedding and consumes as head.
                role = Role.PRODUCES if name == names[0] else Role.CONSUMES
            for index in each.index_maps():
                yield Span(name, each.axis, role, index, each.offset)


def _names(members: Sequence[Named], traced: Trace) -> list[str]:
    """Names within a layer: the kind, with the module where several groups are of one kind."""
    count = Counter(n.kind for n in members)
    same: Counter[str] = Counter()
    names = []
    for named in members:
        name = "experts" if named.kind == EXPERT else named.kind
        if count[named.kind] > 1:
            module = _common_module(named.unit_set).removeprefix(f"{traced.layers}.{named.layer}").strip(".")
            name = f"{name}.{module}" if module else name
        same[name] += 1
        names.append(f"{name}#{same[name]}" if same[name] > 1 else name)
    return names


def _everywhere(parameter: str, traced: Trace) -> list[str]:
    """The names of the parameter in all real layers that its traced layer represents."""
    layer = layer_number(parameter, traced.layers)
    if layer is None:
        return [parameter]
    return [in_layer(parameter, traced.layers, number) for number in traced.stands_for[layer]]


def _table_of_layers(model: PreTrainedModel, layers: str) -> str | None:
    """The name of a parameter outside ``layers`` with a part for every layer, which a cut of layers does not follow:
    embeddings that each layer is given besides the hidden states."""
    size = getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None) or 0
    every = len(model.get_submodule(layers)) * size
    outside = ((name, p.shape) for name, p in model.named_parameters() if not name.startswith(f"{layers}."))
    return next((name for name, shape in outside if every and every in shape), None)


def build_graph(family: ModelFamily, config: PreTrainedConfig) -> CouplingGraph:
    """The coupling graph of a dense model, with the shapes of an instance on the meta device, which takes no memory.
    Raises `CouplingError` where the family's groups contradict them. Where all groups are discovered, ``blocked`` lists
    the axes without units.
    """
    if family.declares_groups:
        return graph_of(meta_model(config), family.coupled_groups(config))
    return discover_graph(config)
