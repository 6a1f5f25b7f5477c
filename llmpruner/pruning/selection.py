"""Selection: from scores, a demand and an allocation to the units that are kept. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from math import isfinite, log10
from typing import TYPE_CHECKING, TypedDict

from ..errors import SelectionError
from ..progress import QUIET, Progress
from ..structure.coupling import CoupledGroup, CouplingGraph
from ..structure.kept import removed_layers
from ..structure.scope import Queue, Scope, build_queue, kept_units
from ..structure.widths import ANY, Widths
from .allocation import Allocation, AllocationTask, Demand, Meter, Taken
from .budgets.base import Cost, saving_units
from .budgets.sizes import parameter_cost

if TYPE_CHECKING:
    from ..structure.kept import Kept
    from .criteria.estimate import Scores


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


def allocate_alike(allocation: Allocation, task: AllocationTask, alike: Sequence[Sequence[str]]) -> Taken:
    """The result of ``allocation`` with the same number of steps in all groups of each entry of ``alike``.

    The allocation is given one queue for each entry, named after its first group; a step of it removes a step of every
    group, and its score is their mean. Groups that are equal but for their layers have equally long queues.
    """
    queues = {queue.group.name: queue for queue in task.queues}
    scored = ([name for name in names if name in queues] for names in alike)
    members = {names[0]: names for names in scored if names}
    together = _Together(task.meter, members)
    loss = task.loss
    taken = allocation.allocate(
        replace(
            task,
            queues=[_joined(name, [queues[n] for n in names]) for name, names in members.items()],
            demand=replace(task.demand, units=_of_first(task.demand.units, members)),
            meter=together,
            loss=None if loss is None else lambda steps: loss(_expanded(steps, members)),
        )
    )
    return _expanded(taken, members)


class _Together(Meter):
    """Counts what is removed when every member takes the steps of its first group."""

    def __init__(self, meter: Meter, members: Mapping[str, Sequence[str]]) -> None:
        super().__init__(meter.cost, ())
        self._meter, self._members = meter, members

    def removed(self, taken: Mapping[str, int]) -> int:
        return self._meter.removed(_expanded(taken, self._members))


def _expanded(taken: Mapping[str, int], members: Mapping[str, Sequence[str]]) -> Taken:
    return {name: taken[first] for first, names in members.items() if first in taken for name in names}


def _joined(name: str, queues: Sequence[Queue]) -> Queue:
    first = next(queue for queue in queues if queue.group.name == name)
    scores = tuple(sum(each) / len(queues) for each in zip(*(queue.scores for queue in queues), strict=True))
    return replace(first, scores=scores, members=tuple(queue.group.name for queue in queues))


def _of_first(units: Mapping[str, float] | None, members: Mapping[str, Sequence[str]]) -> Mapping[str, float] | None:
    return None if units is None else {name: units[name] for name in members}


BINS = 20
_WIDE = 10
"""From this ratio of the largest score to the smallest on, bins are of equal width in the logarithm."""


class Spread(TypedDict):
    """Histogram of scores. ``low``, ``high``: of the first and the last of the bins of equal width; ``log``: whether
    that is the width in the logarithm of the scores. ``kept``, ``removed``: units in each bin."""

    low: float
    high: float
    log: bool
    kept: list[int]
    removed: list[int]


def spread(scores: Sequence[float], kept: Collection[int]) -> Spread:
    """The `Spread` of ``scores``, one for each unit. ``kept``: numbers of the units that stay. Scores that are not
    finite (units that must stay) are left out."""
    known = {unit: score for unit, score in enumerate(scores) if isfinite(score)}
    low, high = min(known.values(), default=0.0), max(known.values(), default=0.0)
    wide = low > 0 and high >= _WIDE * low
    first, last = (log10(low), log10(high)) if wide else (low, high)
    bins = Spread(low=low, high=high, log=wide, kept=[0] * BINS, removed=[0] * BINS)
    stays = set(kept)
    for unit, score in known.items():
        place = ((log10(score) if wide else score) - first) / (last - first) if last > first else 0.0
        bins["kept" if unit in stays else "removed"][min(int(place * BINS), BINS - 1)] += 1
    return bins
