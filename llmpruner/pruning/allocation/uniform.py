"""Equal shares: the same fraction of the units of every group."""

from __future__ import annotations

from .allocate import take_if_it_fits, target_of, top_up
from .base import Allocation, AllocationTask, Taken


class Uniform(Allocation):
    """The same share s of the units of every group (block-wise pruning of LLM-Pruner; Ma, Fang, Wang, 2023).

    s is the largest share that removes at most the requested amount, found by bisection and rounded to whole steps in
    each group. The remainder from rounding is filled with the steps between s and the next larger share, lowest score
    first, and then with any steps (`top_up`).
    """

    name = "uniform"
    summary = "the same share of the units of every group"
    equal_shares = True

    def allocate(self, task: AllocationTask) -> Taken:
        queues, wanted, meter = task.queues, task.demand.units, task.meter
        if wanted is not None:
            return {q.group.name: q.steps_for(wanted[q.group.name]) for q in queues}

        def at(share: float) -> Taken:
            return {q.group.name: q.steps_for(share * q.group.units) for q in queues}

        target = target_of(task)
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if meter.removed(at(middle)) <= target else (low, middle)
        taken, upper = at(low), at(high)
        pending = [
            (queue.scores[n], queue.group.name)
            for queue in queues
            for n in range(taken[queue.group.name], upper[queue.group.name])
        ]
        for _, name in sorted(pending):
            take_if_it_fits(task, taken, name, target)
        return top_up(task, taken)
