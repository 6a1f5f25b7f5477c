"""Groups that must keep the same number of units, treated as one by any allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...structure.queues import Queue
from .base import Allocation, AllocationTask, Meter, Taken


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
