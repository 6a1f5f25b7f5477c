"""Sizes of parameters as a function of the number of units that each group keeps. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod

from ...structure.coupling import CoupledGroup, CouplingGraph
from ...structure.kept import kept_indices, layer_numbers, surviving_units


class SizeModel:
    """Sizes of every parameter of a graph, tied ones included, as a function of the number of units kept per group.

    ``kept``, in all methods: group name → number of units kept, as if no other group lost any; missing groups keep
    all. Exact for groups that own disjoint indices of an axis, and for a group whose units are nested in another's with
    equal numbers per block (query heads in KV heads); groups do not overlap otherwise.
    """

    def __init__(self, graph: CouplingGraph, groups: Collection[CoupledGroup]) -> None:
        owners: dict[tuple[str, int], list[CoupledGroup]] = {}
        for group in groups:
            for key in dict.fromkeys((s.parameter, s.axis) for s in group.spans):
                owners.setdefault(key, []).append(group)
        self._axes = {
            name: [_Axis(name, a, size, owners.get((name, a), [])) for a, size in enumerate(shape)]
            for name, shape in graph.shapes.items()
        }
        self.layer_of = {name: graph.layer_of(name) for name in graph.shapes}
        """Parameter → number of its decoder layer, None outside the decoder layers."""

    def elements(self, name: str, kept: Mapping[str, int]) -> int:
        """Number of remaining elements of parameter ``name``."""
        return prod(axis.size(kept) for axis in self._axes[name])

    def size(self, name: str, axis: int, kept: Mapping[str, int]) -> int:
        """Remaining size of one axis of parameter ``name``."""
        return self._axes[name][axis].size(kept)

    def owned(self, name: str, axis: int, group: CoupledGroup, kept: Mapping[str, int]) -> int:
        """Number of remaining indices of one axis among those that ``group`` owns."""
        return self._axes[name][axis].owned(group, kept)


class _Axis:
    """One axis of one parameter. ``_parts``: numbers of indices that the same groups own, and these groups. In a fused
    matrix, key/value heads own all rows and query heads some of them; the others stay when query heads go."""

    def __init__(self, parameter: str, axis: int, size: int, groups: Sequence[CoupledGroup]) -> None:
        self._size = size
        owned = [_owned(group, parameter, axis) for group in groups]
        owners = Counter(tuple(n for n, of in enumerate(owned) if index in of) for index in set().union(*owned))
        self._parts = [(count, [groups[n] for n in numbers]) for numbers, count in owners.items()]

    def size(self, kept: Mapping[str, int]) -> int:
        return self._size - sum(count - _stay(count, owners, kept) for count, owners in self._parts)

    def owned(self, group: CoupledGroup, kept: Mapping[str, int]) -> int:
        return sum(_stay(count, owners, kept) for count, owners in self._parts if group in owners)


def _stay(count: int, owners: Iterable[CoupledGroup], kept: Mapping[str, int]) -> int:
    for group in owners:
        count = count * kept.get(group.name, group.units) // group.units
    return count


def _owned(group: CoupledGroup, parameter: str, axis: int) -> set[int]:
    spans = (s for s in group.spans if s.parameter == parameter and s.axis == axis)
    return {i for span in spans for i in span.indices(range(group.units))}


def enclosing(groups: Collection[CoupledGroup]) -> dict[str, tuple[CoupledGroup, ...]]:
    """Group name → the groups whose units contain its units: for query heads, their KV heads."""
    blocked = [g for g in groups if g.blocks > 1]
    found = {}
    for inner in blocked:
        keys = {(s.parameter, s.axis) for s in inner.spans}
        near = [
            g
            for g in groups
            if g.units == inner.blocks and g.layer == inner.layer and {(s.parameter, s.axis) for s in g.spans} & keys
        ]
        found[inner.name] = tuple(g for g in near if any(_owned(g, *k) & _owned(inner, *k) for k in keys))
    return found


def counts(graph: CouplingGraph, kept: Mapping[str, Sequence[int]]) -> tuple[dict[str, int], set[int]]:
    """From ``kept`` (group name → kept units) to (group name → number of kept units, as `SizeModel` counts them;
    numbers of the removed layers)."""
    axes = kept_indices(graph, kept)
    found: dict[str, int] = {}
    for name in kept:
        group = graph.by_name[name]
        if group.modules:
            continue
        units = surviving_units(graph, kept, group, axes)
        # A block without remaining units was removed by the enclosing group, whose number of units counts that.
        per_block = group.units // group.blocks
        found[name] = len(units) * group.blocks // len({u // per_block for u in units})
    return found, set(range(graph.num_layers)) - set(layer_numbers(graph, kept))
