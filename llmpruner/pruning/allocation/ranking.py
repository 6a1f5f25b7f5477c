"""One ranking of the units of all groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from .allocate import take_if_it_fits, target_of, top_up
from .base import Allocation, AllocationTask, Demand, Taken
from .uniform import Uniform


class GlobalRanking(Allocation):
    """All steps of all groups in one order, lowest score first: the longest prefix that removes no more than the
    requested amount. A group whose next step does not fit loses no more, and the others go on in the same order; the
    last step is as `top_up` says.

    Where further cuts follow (`Demand.whole`), a step that only the whole amount has room for is not passed over: the
    cut ends before it, or with it if that is nearer to the amount, and later ones remove the difference more or less.

    Where shares of units are asked for, the amount is what equal shares save: a head is not worth one MLP channel.
    Scores of different groups must be comparable (`llmpruner.pruning.allocation.normalize`).
    """

    name = "global"
    summary = "one ranking of the units of all groups, lowest score first"
    compares_groups = True

    def allocate(self, task: AllocationTask) -> Taken:
        queues = {queue.group.name: queue for queue in task.queues}
        order = [n for *_, n in sorted((s, at, q.group.name) for at, q in enumerate(task.queues) for s in q.scores)]

        def first(count: int) -> Taken:
            counted = Counter(order[:count])
            return {name: counted[name] for name in queues}

        if task.demand.units is not None:
            amount = task.meter.removed(Uniform().allocate(task))
            task = replace(task, demand=Demand(amount=amount, meet=task.demand.meet))
        target = target_of(task)
        start = _largest(len(order), lambda n: task.meter.removed(first(n)) <= target)
        taken, full = first(start), set[str]()
        for name in order[start:]:
            if name in full or take_if_it_fits(task, taken, name, target):
                continue
            if _waits(task, taken, name, target):
                return taken
            full.add(name)
        return taken if task.demand.whole is not None else top_up(task, taken)


def _waits(task: AllocationTask, taken: Taken, name: str, target: int) -> bool:
    """Whether a step of group ``name``, which does not fit into this cut, fits into this one and those to come
    together. Takes it if that is nearer to ``target``."""
    more = {**taken, name: taken[name] + 1}
    before, after = task.meter.removed(taken), task.meter.removed(more)
    if task.demand.whole is None or not before < after <= task.demand.whole:
        return False
    if after - target < target - before:
        taken.update(more)
    return True


def _largest(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest n in 0…limit for which the monotone ``holds`` is true (0 when it never is)."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
