"""How many parameters remain when each group keeps so many units: arithmetic on counts, without index sets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

from ..coupling import CoupledGroup, CouplingGraph


class SizeModel:
    """Parameter counts of a graph as a function of (units kept per group, layers removed).

    Exact where groups own disjoint indices of an axis, and where one group's units are nested in another's with
    equal numbers per block (query heads in KV heads), which are the overlaps that groups can have.
    """

    def __init__(self, graph: CouplingGraph, groups: Collection[CoupledGroup]) -> None:
        self._graph = graph
        self._axes: dict[str, list[_Axis]] = {}
        owners: dict[tuple[str, int], list[CoupledGroup]] = {}
        for group in groups:
            for key in dict.fromkeys((s.parameter, s.axis) for s in group.spans):
                owners.setdefault(key, []).append(group)
        for name, shape in graph.shapes.items():
            if name not in graph.ties:
                self._axes[name] = [_Axis(name, a, size, owners.get((name, a), [])) for a, size in enumerate(shape)]
        prefix = graph.layers + "."
        self._layer_of = {n: int(n[len(prefix) :].split(".")[0]) for n in self._axes if n.startswith(prefix)}

    def remaining(self, kept: Mapping[str, int], gone_layers: Collection[int] = ()) -> tuple[int, int]:
        """(total, decoder) parameters. ``kept``: group name → number of units kept; missing groups keep all."""
        total = decoder = 0
        for name, axes in self._axes.items():
            layer = self._layer_of.get(name)
            if layer in gone_layers and layer is not None:
                continue
            count = prod(axis.size(kept) for axis in axes)
            total += count
            decoder += count if layer is not None else 0
        return total, decoder


class _Axis:
    """One axis of one parameter: a size, less what each cluster of overlapping groups gives up."""

    def __init__(self, parameter: str, axis: int, size: int, groups: list[CoupledGroup]) -> None:
        self._size = size
        self._clusters: list[tuple[int, list[CoupledGroup]]] = []
        owned = {g.name: _owned(g, parameter, axis) for g in groups}
        left = list(groups)
        while left:
            cluster = [left.pop(0)]
            union = set(owned[cluster[0].name])
            for group in list(left):
                if union & owned[group.name]:
                    cluster.append(group)
                    left.remove(group)
                    union |= owned[group.name]
            self._clusters.append((len(union), cluster))

    def size(self, kept: Mapping[str, int]) -> int:
        size = self._size
        for owned, cluster in self._clusters:
            stay = owned
            for group in cluster:
                stay = stay * kept.get(group.name, group.units) // group.units
            size -= owned - stay
        return size


def _owned(group: CoupledGroup, parameter: str, axis: int) -> set[int]:
    spans = (s for s in group.spans if s.parameter == parameter and s.axis == axis)
    return {i for span in spans for i in span.indices(range(group.units))}
