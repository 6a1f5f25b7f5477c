"""Selection: scores and a demand → the units that stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..budgets.costs import Cost, parameter_cost, saving_units
from ..errors import SelectionError, UnknownNameError
from ..progress import Progress
from ..structure.coupling import LAYER, CoupledGroup, CouplingGraph
from ..structure.queues import build_queue, kept_units
from ..structure.scope import Scope
from .allocate import ALLOCATIONS
from .base import Demand, Meter, Taken
from .search import MEASURED

if TYPE_CHECKING:
    from ..importance.estimate import Scores
    from ..structure.kept import Kept


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


def _without_removed_layers(graph: CouplingGraph, kept: Mapping[str, tuple[int, ...]]) -> Kept:
    """Cuts inside a layer that goes as a whole say nothing."""
    gone = {
        unit
        for name, units in kept.items()
        if (group := graph.by_name[name]).kind == LAYER
        for unit in set(range(group.units)) - set(units)
    }
    return {name: units for name, units in kept.items() if graph.by_name[name].layer not in gone}
