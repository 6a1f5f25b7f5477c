"""Selection: scores and a demand → the units that stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..coupling import LAYER, CoupledGroup, CouplingGraph
from ..errors import SelectionError, UnknownNameError
from ..progress import Progress
from .allocate import ALLOCATIONS, Demand, Meter, Taken
from .candidates import build_queue, kept_units
from .costs import Cost, parameter_cost, savings
from .search import MEASURED

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
    cost: Cost | None = None,
    allocation: str = "uniform",
    round_to: int = 1,
    loss: Callable[[Kept], float] | None = None,
    progress: Progress | None = None,
) -> Kept:
    """Choose what stays. Deterministic: equal scores are ordered by unit number.

    ``cost``: what ``demand.amount`` is of; None for the decoder's parameters. What saves nothing of it stays.
    ``loss``: how far a cut leaves the model from what it was, for an ``allocation`` in `MEASURED`.
    Empty when the demand is less than half a unit. Raises `SelectionError` when it cannot be reached.
    """
    if allocation not in (*ALLOCATIONS, *MEASURED):
        raise UnknownNameError("allocation", allocation, (*ALLOCATIONS, *MEASURED))
    cost = cost or parameter_cost(graph, groups, decoder=True)
    allowed = {group.name: scope.allowed_units(group) for group in groups}
    if demand.units is None:
        allowed = saving_units(cost, groups, allowed)
    queues = [
        build_queue(g, scores.by_group[g.name].tolist(), allowed=allowed[g.name], round_to=round_to)
        for g in groups
        if g.name in allowed
    ]
    meter = Meter(cost, queues)

    def chosen(taken: Taken) -> Kept:
        return _without_removed_layers(graph, kept_units(queues, taken))

    if allocation in ALLOCATIONS:
        return chosen(ALLOCATIONS[allocation](queues, demand, meter))
    if loss is None:
        raise SelectionError(f"allocation {allocation} measures the model, and needs a loss to do so")
    measure = loss
    taken = MEASURED[allocation](queues, demand, meter, lambda taken: measure(chosen(taken)), progress or Progress())
    return chosen(taken)


def saving_units(
    cost: Cost, groups: Sequence[CoupledGroup], allowed: Mapping[str, frozenset[int] | None]
) -> dict[str, frozenset[int] | None]:
    """``allowed`` (group name → units that may go, None for all), less what saves nothing of ``cost``.

    Raises `SelectionError` when nothing is left.
    """
    found: dict[str, frozenset[int] | None] = {}
    for group in groups:
        units, saved = allowed[group.name], savings(cost, group)
        useful = {u for u, saves in enumerate(saved) if saves > 0 and (units is None or u in units)}
        if useful:
            found[group.name] = None if len(useful) == group.units else frozenset(useful)
    if not found:
        kinds = ", ".join(dict.fromkeys(group.kind for group in groups))
        raise SelectionError(f"{kinds} units save nothing of the {cost.label}; choose others with --kinds")
    return found


def _without_removed_layers(graph: CouplingGraph, kept: Mapping[str, tuple[int, ...]]) -> Kept:
    """Cuts inside a layer that goes as a whole say nothing."""
    gone = {
        unit
        for name, units in kept.items()
        if (group := graph.by_name[name]).kind == LAYER
        for unit in set(range(group.units)) - set(units)
    }
    return {name: units for name, units in kept.items() if graph.by_name[name].layer not in gone}
