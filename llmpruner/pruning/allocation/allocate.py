"""Functions for allocations: the requested amount, and single steps towards it."""

from __future__ import annotations

from ...errors import SelectionError
from .base import AllocationTask, Taken


def target_of(task: AllocationTask) -> int:
    """The requested amount of ``task``, in the units of `Cost.remaining`; 0 where the demand is in units. Raises
    `SelectionError` when all steps of all queues remove less than it, or than what further cuts are to remove."""
    target, cost = task.demand.amount or 0, task.meter.cost
    most = task.meter.removed({queue.group.name: len(queue.steps) for queue in task.queues})
    whole = max(target, task.demand.whole or 0)
    if whole > most:
        raise SelectionError(
            f"cannot remove {cost.number(whole)} {cost.unit}: the selected kinds and layers can give at most "
            f"{cost.number(most)}; select more with --kinds or --layers, or ask for less"
        )
    return target


def take_if_it_fits(task: AllocationTask, taken: Taken, name: str, target: int) -> bool:
    """Add one step of group ``name`` to ``taken`` if that removes something and no more than ``target`` in all;
    otherwise leave ``taken`` as it is. Returns whether the step was taken."""
    before = task.meter.removed(taken)
    taken[name] += 1
    if before < task.meter.removed(taken) <= target:
        return True
    taken[name] -= 1
    return False


def top_up(task: AllocationTask, taken: Taken) -> Taken:
    """Add single steps to ``taken`` until the removed amount meets the requested one, as ``task.demand.meet`` says, as
    nearly as one step allows, and return ``taken``.

    One step of every queue in turn is taken if it fits, until none fits: where a step of large units (a KV head has
    the parameters of hundreds of MLP channels) would exceed the amount, smaller ones are taken. Finally, one step
    beyond the amount is taken if that is nearer to it (``nearest``), or if the amount is not reached (``above``).

    Raises `SelectionError` as `target_of` does.
    """
    target = target_of(task)
    moved = True
    while moved:
        moved = False
        for queue in task.queues:
            name = queue.group.name
            if taken[name] < len(queue.steps) and take_if_it_fits(task, taken, name, target):
                moved = True
    gap = target - task.meter.removed(taken)
    over = [
        (task.meter.removed({**taken, q.group.name: taken[q.group.name] + 1}) - target, number, q.group.name)
        for number, q in enumerate(task.queues)
        if taken[q.group.name] < len(q.steps)
    ]
    limit = {"nearest": gap, "above": float("inf") if gap > 0 else 0, "below": 0}[task.demand.meet]
    best = min((entry for entry in over if 0 < entry[0] < limit), default=None)
    if best is not None:
        taken[best[2]] += 1
    return taken
