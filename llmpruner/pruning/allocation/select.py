"""Selection: from scores and a demand to the units that are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ...errors import SelectionError
from ...progress import QUIET, Progress
from ...structure.coupling import CoupledGroup, CouplingGraph
from ...structure.kept import removed_layers
from ...structure.queues import build_queue, kept_units
from ...structure.scope import Scope
from ...structure.widths import ANY, Widths
from ..budgets.costs import Cost, saving_units
from ..budgets.weights import parameter_cost
from .alike import allocate_alike
from .base import Allocation, AllocationTask, Demand, Meter, Taken

if TYPE_CHECKING:
    from ...structure.kept import Kept
    from ..criteria.estimate import Scores


def select(
    graph: CouplingGraph,
    groups: Sequence[CoupledGroup],
    scores: Scores,
    scope: Scope,
    demand: Demand,
    allocation: Allocation,
    *,
    cost: Cost | None = None,
    widths: Widths = ANY,
    loss: Callable[[Kept], float] | None = None,
    progress: Progress = QUIET,
) -> Kept:
    """Group name → kept units, without groups that keep all; empty when the demand is less than half a unit.
    Deterministic: equal scores are ordered by unit number.

    ``allocation``: decides how many units each group loses; the scores decide which. ``cost``: of ``demand.amount``
    (default: the decoder's parameters); units that save nothing of it are kept, unless ``widths`` forbids it. ``loss``:
    for an allocation that measures, kept units → divergence of the cut model from the current one. ``widths``: what
    groups may keep.

    Raises `SelectionError` when the demand cannot be met.
    """
    if allocation.measures and loss is None:
        raise SelectionError(f"{allocation.label()} measures the model on calibration text, and none is given")
    cost = cost or parameter_cost(graph, groups, decoder=True)
    allowed = {group.name: scope.allowed_units(group) for group in groups}
    if demand.units is None:
        allowed = saving_units(cost, groups, allowed, widths.alike(groups))
    queues = [
        build_queue(g, scores.by_group[g.name].tolist(), allowed=allowed[g.name], multiple=widths.multiple(g))
        for g in groups
        if g.name in allowed
    ]

    def chosen(taken: Taken) -> Kept:
        return _without_removed_layers(graph, kept_units(queues, taken))

    measured = (lambda taken: loss(chosen(taken))) if loss is not None else None
    task = AllocationTask(queues, demand, Meter(cost, queues), measured, progress)
    return chosen(allocate_alike(allocation, task, widths.alike(groups)))


def _without_removed_layers(graph: CouplingGraph, kept: Mapping[str, tuple[int, ...]]) -> Kept:
    """``kept`` without the groups inside layers that are removed."""
    gone = removed_layers(graph, kept)
    return {name: units for name, units in kept.items() if graph.by_name[name].layer not in gone}
