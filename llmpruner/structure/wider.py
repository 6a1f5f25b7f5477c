"""Which units to put back so that like groups of all layers have the same number of units. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .coupling import CoupledGroup, CouplingGraph
from .kept import Kept, kept_indices, surviving_units
from .widths import like


def widest(graph: CouplingGraph, now: Kept) -> dict[str, tuple[int, ...]]:
    """``now`` with removed units put back, the first ones first, until every group has as many as the widest of its
    kind and size in any layer. Groups across layers stay as they are."""
    survivors = all_survivors(graph, now)
    most: dict[tuple[object, ...], int] = {}
    for group in _in_layers(graph):
        units, size = survivors[group.name], group.units // group.blocks
        per_block = len(units) // len({unit // size for unit in units})
        most[like(group)] = max(most.get(like(group), 0), per_block)
    return _widened(graph, now, survivors, lambda group: most[like(group)])


def dense(graph: CouplingGraph, now: Kept) -> dict[str, tuple[int, ...]]:
    """``now`` with all removed units put back, but for groups across layers."""
    return _widened(graph, now, all_survivors(graph, now), lambda group: group.units // group.blocks)


def all_survivors(graph: CouplingGraph, now: Kept) -> dict[str, list[int]]:
    """Group name → the units that remain, those that went with units of other groups left out."""
    axes = kept_indices(graph, now)
    return {group.name: surviving_units(graph, now, group, axes) for group in graph.groups}


def _widened(
    graph: CouplingGraph, now: Kept, survivors: Kept, wanted: Callable[[CoupledGroup], int]
) -> dict[str, tuple[int, ...]]:
    """``wanted``: how many units each block of a group of one layer shall have (most groups are one block)."""
    kept = {name: tuple(units) for name, units in now.items()}
    for group in _in_layers(graph):
        units = _filled(group, set(survivors[group.name]), set(now.get(group.name, range(group.units))), wanted(group))
        if len(units) < group.units:
            kept[group.name] = units
        else:
            kept.pop(group.name, None)
    return kept


def _filled(group: CoupledGroup, survivors: set[int], own: set[int], wanted: int) -> tuple[int, ...]:
    size = group.units // group.blocks
    units: list[int] = []
    for start in range(0, group.units, size):
        block = range(start, start + size)
        # A block that went with a unit of another group (the query heads of a removed key/value head) has units of its
        # own in `now`, which are not among the survivors.
        stay = [u for u in block if u in survivors] or [u for u in block if u in own][:wanted]
        others = sorted(set(block) - set(stay))
        units += sorted([*stay, *others[: max(0, wanted - len(stay))]])
    return tuple(units)


def _in_layers(graph: CouplingGraph) -> Iterator[CoupledGroup]:
    return (group for group in graph.groups if group.layer is not None)
