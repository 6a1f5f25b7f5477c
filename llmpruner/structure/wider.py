"""Which units to put back so that like groups of all layers have the same number of units. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .coupling import CoupledGroup, CouplingGraph
from .kept import Kept, surviving_units


def widest(graph: CouplingGraph, now: Kept) -> dict[str, tuple[int, ...]]:
    """``now`` with removed units put back, the first ones first, until every group has as many as the widest of its
    kind and size in any layer. Groups across layers stay as they are."""
    most: dict[tuple[object, ...], int] = {}
    for group in graph.groups:
        most[_like(group)] = max(most.get(_like(group), 0), count(graph, now, group))
    return _widened(graph, now, lambda group: most[_like(group)])


def dense(graph: CouplingGraph, now: Kept) -> dict[str, tuple[int, ...]]:
    """``now`` with all removed units put back, but for groups across layers."""
    return _widened(graph, now, lambda group: group.units // group.blocks)


def _widened(graph: CouplingGraph, now: Kept, wanted: Callable[[CoupledGroup], int]) -> dict[str, tuple[int, ...]]:
    """``now`` with removed units put back, the first ones first. ``wanted``: how many units each block of a group of
    one layer shall have (most groups are one block)."""
    kept = {name: tuple(units) for name, units in now.items()}
    for group in graph.groups:
        if group.layer is None:
            continue
        units = _filled(group, surviving_units(graph, now, group), now.get(group.name), wanted(group))
        if len(units) < group.units:
            kept[group.name] = units
        else:
            kept.pop(group.name, None)
    return kept


def count(graph: CouplingGraph, now: Kept, group: CoupledGroup) -> int:
    """The units that ``now`` leaves in each block of ``group`` of which it leaves any."""
    units, size = surviving_units(graph, now, group), group.units // group.blocks
    return len(units) // len({unit // size for unit in units})


def _filled(group: CoupledGroup, survivors: Sequence[int], own: Sequence[int] | None, wanted: int) -> tuple[int, ...]:
    size = group.units // group.blocks
    units: list[int] = []
    for start in range(0, group.units, size):
        block = range(start, start + size)
        # A block that went with a unit of another group (the query heads of a removed key/value head) has units of its
        # own in `now`, which are not among the survivors.
        stay = [u for u in block if u in set(survivors)] or [u for u in block if own is None or u in set(own)][:wanted]
        others = [u for u in block if u not in set(stay)]
        units += sorted([*stay, *others[: max(0, wanted - len(stay))]])
    return tuple(units)


def _like(group: CoupledGroup) -> tuple[object, ...]:
    return (group.name if group.layer is None else group.in_layer(0)), group.kind, group.units, group.blocks
