"""One ranking of the units of all groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from .allocate import groups_of, removed_units, target_of, top_up
from .base import Allocation, AllocationTask, Taken


class GlobalRanking(Allocation):
    """All steps of all groups in one order, lowest score first: the longest prefix that removes no more than the
    requested amount, then `top_up`.

    Scores of different groups must be comparable (`llmpruner.selection.normalize`).
    """

    name = "global"
    summary = "one ranking of the units of all groups, lowest score first"
    compares_groups = True

    def allocate(self, task: AllocationTask) -> Taken:
        queues = {queue.group.name: queue for queue in task.queues}
        order = sorted((s, number, q.group.name) for number, q in enumerate(task.queues) for s in q.scores)

        def first(count: int) -> Taken:
            counted = Counter(name for _, _, name in order[:count])
            return {name: counted[name] for name in queues}

        if task.demand.units is not None:
            goal = sum(task.demand.units[name] * groups_of(queue) for name, queue in queues.items())
            return first(_largest(len(order), lambda n: removed_units(task, first(n)) <= goal + 0.5))
        target = target_of(task)
        return top_up(task, first(_largest(len(order), lambda n: task.meter.removed(first(n)) <= target)))


def _largest(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest n in 0…limit for which the monotone ``holds`` is true (0 when it never is)."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
