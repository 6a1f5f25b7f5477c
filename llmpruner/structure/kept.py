"""Which units stay, as numbers alone. ``kept``: group name → units that stay; other groups keep everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..errors import PlanError
from .coupling import LAYER, Blocks, CoupledGroup, CouplingGraph, IndexMap, Span, in_layer, index_map, layer_number

Kept = Mapping[str, Sequence[int]]


def removed_layers(graph: CouplingGraph, kept: Kept) -> set[int]:
    stay = [set(units) for name, units in kept.items() if graph.by_name[name].kind == LAYER]
    return {number for units in stay for number in range(graph.num_layers) if number not in units}


def compose(graph: CouplingGraph, first: Kept, second: Kept) -> dict[str, tuple[int, ...]]:
    """Two successive cuts as one, in units of ``graph``; ``second`` is in units of the cut model. A block of which
    ``first`` left nothing (the query heads of a removed key/value head) keeps as many units as the others."""
    kept = {name: tuple(units) for name, units in first.items()}
    axes = kept_indices(graph, first)
    for original, current in renamed(graph, first).items():
        if current in second:
            group = graph.by_name[original]
            survivors = surviving_units(first, group, axes)
            units = [survivors[unit] for unit in second[current]]
            size = group.units // group.blocks
            live = {unit // size for unit in survivors}
            each = len(units) // len(live)
            for gone in set(range(group.blocks)) - live:
                units += [u for u in first.get(original, range(group.units)) if u // size == gone][:each]
            kept[original] = tuple(sorted(units))
    return kept


def check_kept(graph: CouplingGraph, kept: Kept) -> None:
    """Raise `PlanError` unless ``kept`` names known groups, known units, and obeys every group's constraints."""
    for name, units in kept.items():
        if (group := graph.by_name.get(name)) is None:
            raise PlanError(f"the plan cuts group '{name}', which this model does not have")
        if list(units) != sorted(set(units)) or (units and not 0 <= units[0] <= units[-1] < group.units):
            raise PlanError(f"group '{name}': kept units must be increasing and within 0…{group.units - 1}")
        must = f"group '{name}' must keep"
        if len(units) < group.minimum:
            raise PlanError(f"{must} at least {group.minimum} units, the plan keeps {len(units)}")
        if len(units) < group.units and len(units) % group.multiple:
            raise PlanError(f"{must} a multiple of {group.multiple} units, the plan keeps {len(units)}")
        if group.blocks > 1:
            counts = Counter(unit * group.blocks // group.units for unit in units)
            if len({counts[block] for block in range(group.blocks)}) > 1:
                raise PlanError(f"{must} the same number of units in each of its {group.blocks} blocks")


def kept_indices(graph: CouplingGraph, kept: Kept, prefix: str = "") -> dict[tuple[str, int], list[int]]:
    """(parameter or buffer, axis) → the sorted indices that stay, for tensors whose names have ``prefix``."""
    # Layers that share weights have several names for one tensor, and groups know one of them.
    aliases = {alias: name for alias, name in graph.ties.items() if alias.startswith(prefix)}
    owners = set(aliases.values())
    removed: dict[tuple[str, int], set[int]] = {}
    for name, units in kept.items():
        group = graph.by_name[name]
        spans = [s for s in group.cut_spans if s.parameter.startswith(prefix) or s.parameter in owners]
        gone = sorted(set(range(group.units)) - set(units)) if spans else []
        for span in spans:
            removed.setdefault((span.parameter, span.axis), set()).update(span.indices(gone))
    for alias, name in aliases.items():
        for axis in (axis for axis in range(len(graph.shapes[name])) if (name, axis) in removed):
            removed.setdefault((alias, axis), set()).update(removed[name, axis])
    return {
        (name, axis): [i for i in range((graph.shapes.get(name) or graph.buffers[name])[axis]) if i not in gone]
        for (name, axis), gone in removed.items()
        if gone and name.startswith(prefix)
    }


def restrict(graph: CouplingGraph, kept: Kept) -> CouplingGraph:
    """The coupling graph of the cut model: shapes, index maps, and layer numbers follow the cut."""
    axes, numbers, groups = kept_indices(graph, kept), layer_numbers(graph, kept), []
    move = partial(path_after, layers=graph.layers, numbers=numbers)

    def cut(spans: Sequence[Span], units: list[int]) -> tuple[Span, ...]:
        return tuple(
            replace(s, parameter=name, index=_restrict_index(s, units, axes.get((s.parameter, s.axis))))
            for s in spans
            if (name := move(s.parameter))
        )

    def shapes(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(len(axes.get((old, axis), range(size))) for axis, size in enumerate(shape))
            for old, shape in tensors.items()
            if (name := move(old))
        }

    for group in (g for g in graph.groups if g.layer is None or g.layer in numbers):
        units = surviving_units(kept, group, axes)
        blocks = len({unit * group.blocks // group.units for unit in units})
        # The minimum is shared equally by the blocks; removed blocks no longer need their share.
        minimum = min(-(-group.minimum * blocks // group.blocks), len(units))
        layer = None if group.layer is None else numbers[group.layer]
        parts: dict[str, Any] = {"spans": cut(group.spans, units), "buffers": cut(group.buffers, units)}
        groups.append(replace(group, units=len(units), blocks=blocks, minimum=minimum, layer=layer, **parts))
    ties = {n: t for a, b in graph.ties.items() if (n := move(a)) and (t := move(b))}
    return CouplingGraph(tuple(groups), shapes(graph.shapes), graph.layers, ties, graph.blocked, shapes(graph.buffers))


def surviving_units(kept: Kept, group: CoupledGroup, axes: Mapping[tuple[str, int], list[int]]) -> list[int]:
    """The units that are kept, and not removed with another group's (a query head with its KV head)."""
    units = list(kept.get(group.name, range(group.units)))
    for span in group.spans:
        stay = axes.get((span.parameter, span.axis))
        if stay is not None and span.indices(units) != stay:
            present = set(stay)
            units = [u for u in units if not present.isdisjoint(span.index.of(u))]
    return units


def renamed(graph: CouplingGraph, kept: Kept) -> dict[str, str]:
    """Name of a group before the cut → after it, for the groups that remain (removed layers renumber the others)."""
    numbers = layer_numbers(graph, kept)
    stay = (g for g in graph.groups if g.layer is None or g.layer in numbers)
    return {g.name: g.name if g.layer is None else g.in_layer(numbers[g.layer]) for g in stay}


def _restrict_index(span: Span, units: list[int], stay: list[int] | None) -> IndexMap:
    """``stay``: the indices of the axis that stay, in ascending order; None for all."""
    # Nearly all spans are one of the first two cases, and a large model has millions of indices.
    if stay is None and len(units) == span.index.units:
        return span.index
    if stay and span.indices(units) == stay:
        return Blocks(len(units), span.index.width)
    rows = [list(span.index.of(u)) for u in units]
    if stay is not None:
        position = {old: new for new, old in enumerate(stay)}
        rows = [[position[i] for i in row if i in position] for row in rows]
    return index_map(rows)


def layer_numbers(graph: CouplingGraph, kept: Kept) -> dict[int, int]:
    """Layer number before the cut → after it, for the layers that remain."""
    gone = removed_layers(graph, kept)
    return {old: new for new, old in enumerate(n for n in range(graph.num_layers) if n not in gone)}


def path_after(path: str, layers: str, numbers: Mapping[int, int]) -> str | None:
    """The path of a module or parameter after a cut, see `layer_numbers`; None where its layer was removed."""
    if (number := layer_number(path, layers)) is None:
        return path
    return in_layer(path, layers, numbers[number]) if number in numbers else None
