"""Selection: scores and a demand → the units that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..coupling import LAYER, CoupledGroup, CouplingGraph
from ..errors import SelectionError, UnknownNameError
from .allocate import ALLOCATIONS, Demand, Meter
from .candidates import build_queue, kept_units
from .sizes import SizeModel

if TYPE_CHECKING:
    from ..importance.estimate import Scores
    from ..surgery import Kept


@dataclass(frozen=True, slots=True)
class Scope:
    """What may be cut: kinds of groups, and decoder layers (numbers in the graph at hand)."""

    kinds: tuple[str, ...]
    layers: tuple[int, ...]

    def groups(self, graph: CouplingGraph) -> tuple[CoupledGroup, ...]:
        """The groups in scope. Raises `UnknownNameError` for a kind that the model does not have."""
        for kind in self.kinds:
            if kind not in graph.kinds:
                raise UnknownNameError("kind of group in this model:", kind, graph.kinds)
        inside = set(self.layers)
        found = tuple(g for g in graph.of_kinds(self.kinds) if g.layer is None or g.layer in inside)
        if not found:
            raise SelectionError("no coupled group is left to prune: select more with --kinds or --layers")
        return found

    def allowed_units(self, group: CoupledGroup) -> frozenset[int] | None:
        return frozenset(self.layers) if group.kind == LAYER else None


def select(
    graph: CouplingGraph,
    groups: Sequence[CoupledGroup],
    scores: Scores,
    scope: Scope,
    demand: Demand,
    *,
    allocation: str = "uniform",
    round_to: int = 1,
) -> Kept:
    """Choose what stays. Deterministic: equal scores are ordered by unit number.

    Empty when the demand is less than half a unit. Raises `SelectionError` when it cannot be reached.
    """
    if allocation not in ALLOCATIONS:
        raise UnknownNameError("allocation", allocation, ALLOCATIONS)
    queues = [
        build_queue(g, scores.by_group[g.name].tolist(), allowed=scope.allowed_units(g), round_to=round_to)
        for g in groups
    ]
    meter = Meter(SizeModel(graph, groups), queues, of_decoder=demand.of_decoder)
    kept = kept_units(queues, ALLOCATIONS[allocation](queues, demand, meter))
    return _without_removed_layers(graph, kept)


def _without_removed_layers(graph: CouplingGraph, kept: Mapping[str, tuple[int, ...]]) -> Kept:
    """Cuts inside a layer that goes as a whole say nothing."""
    gone = {
        unit
        for name, units in kept.items()
        if (group := graph.by_name[name]).kind == LAYER
        for unit in set(range(group.units)) - set(units)
    }
    return {name: units for name, units in kept.items() if graph.by_name[name].layer not in gone}
