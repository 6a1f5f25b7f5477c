"""Allocation: how many steps each group's queue gives up so that the demand is met. Pure functions, no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ..errors import SelectionError
from ..structure.queues import Queue
from .base import Demand, Meter, Taken


def uniform(queues: Sequence[Queue], demand: Demand, meter: Meter) -> Taken:
    """The same share of units from every group (the paper's block-wise pruning), then single steps, least important
    first, to come as close to the demand as one unit allows."""
    if demand.units is not None:
        return {q.group.name: q.steps_for(demand.units[q.group.name]) for q in queues}

    def at(share: float) -> Taken:
        return {q.group.name: q.steps_for(share * q.group.units) for q in queues}

    target = _target(queues, demand, meter)
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
        _take_if_it_fits(taken, name, target, meter)
    return top_up(queues, taken, target, meter)


def global_ranking(queues: Sequence[Queue], demand: Demand, meter: Meter) -> Taken:
    """One ranking of all steps of all groups by importance, from the bottom up."""
    order = sorted((score, number, queue.group.name) for number, queue in enumerate(queues) for score in queue.scores)

    def first(count: int) -> Taken:
        counted = Counter(name for _, _, name in order[:count])
        return {q.group.name: counted[q.group.name] for q in queues}

    if demand.units is not None:
        widths = {q.group.name: q for q in queues}
        goal = sum(demand.units.values())
        return first(_largest(len(order), lambda n: _units(widths, first(n)) <= goal + 0.5))
    target = _target(queues, demand, meter)
    count = _largest(len(order), lambda n: meter.removed(first(n)) <= target)
    return top_up(queues, first(count), target, meter)


def _units(queues: Mapping[str, Queue], taken: Taken) -> int:
    return sum(queues[name].removed_after(steps) for name, steps in taken.items())


def _largest(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest n in 0…limit for which the monotone ``holds`` is true (0 when it never is)."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


Allocation = Callable[[Sequence[Queue], Demand, Meter], Taken]
ALLOCATIONS: Mapping[str, Allocation] = {"uniform": uniform, "global": global_ranking}


def _target(queues: Sequence[Queue], demand: Demand, meter: Meter) -> int:
    target = demand.amount or 0
    most = meter.removed({q.group.name: len(q.steps) for q in queues})
    if target > most:
        raise SelectionError(
            f"cannot remove {meter.cost.number(target)} {meter.cost.unit}: the selected kinds and layers can give at "
            f"most {meter.cost.number(most)}; select more with --kinds or --layers, or ask for less"
        )
    return target


def _take_if_it_fits(taken: Taken, name: str, target: int, meter: Meter) -> bool:
    """Take one more step of group ``name`` if that removes something and no more than is asked for."""
    before = meter.removed(taken)
    taken[name] += 1
    if before < meter.removed(taken) <= target:
        return True
    taken[name] -= 1
    return False


def top_up(queues: Sequence[Queue], taken: Taken, target: int, meter: Meter) -> Taken:
    """Close the gap that coarse units left (a KV head is worth hundreds of channels) with finer ones, round by round;
    last, go over the target by one step where that is nearer."""
    moved = True
    while moved:
        moved = False
        for queue in queues:
            name = queue.group.name
            if taken[name] < len(queue.steps) and _take_if_it_fits(taken, name, target, meter):
                moved = True
    gap = target - meter.removed(taken)
    over = [
        (meter.removed({**taken, q.group.name: taken[q.group.name] + 1}) - target, number, q.group.name)
        for number, q in enumerate(queues)
        if taken[q.group.name] < len(q.steps)
    ]
    nearer = min((entry for entry in over if 0 < entry[0] < gap), default=None)
    if nearer is not None:
        taken[nearer[2]] += 1
    return taken
