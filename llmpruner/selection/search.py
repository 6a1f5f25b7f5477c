"""Allocation by measuring: how much quality each group's share costs, in the model itself.

``sensitivity`` measures every group alone, and so misses what cuts do to one another. ``search`` measures where it
stands: from equal shares it moves the budget, group by group, from where a little more hurts much to where it hurts
little, and keeps a move only if the whole model is better for it (the levels of ZipLM, Kurtic et al., 2023, and Týr,
Li et al., 2024, compared at the operating point).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median

from ..progress import Progress
from ..structure.queues import Queue
from .allocate import global_ranking, top_up, uniform
from .base import Demand, Meter, Taken

Loss = Callable[[Taken], float]
"""Steps taken from each group → how far the model is from the dense one; lower is better."""

MeasuredAllocation = Callable[[Sequence[Queue], Demand, Meter, Loss, Progress], Taken]

LEVELS = (0.25, 0.5, 1.0)
PROBE = 0.05
REACH = 4.0
ROUNDS = 3


def sensitivity(queues: Sequence[Queue], demand: Demand, meter: Meter, loss: Loss, progress: Progress) -> Taken:
    """The smallest sum of the divergences that groups cause when they are cut alone, measured at a quarter, half and
    all of their units and interpolated between them."""
    dense = loss({})
    ranked = []
    for queue in progress.track(queues, "Measuring groups"):
        name = queue.group.name
        levels = sorted({max(1, round(share * len(queue.steps))) for share in LEVELS if queue.steps})
        points = [(0, 0.0), *((steps, loss({name: steps}) - dense) for steps in levels)]
        ranked.append(replace(queue, scores=tuple(_per_saving(queue, points, meter))))
    return global_ranking(ranked, demand, meter)


def _per_saving(queue: Queue, points: Sequence[tuple[int, float]], meter: Meter) -> Iterator[float]:
    """Loss per step over what a step saves, never falling: on the lower convex hull of ``points``, so that a group's
    steps are worth taking in their order."""
    hull: list[tuple[int, float]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    name = queue.group.name
    for start, stop in pairwise(hull):
        saved = meter.removed({name: stop[0]}) - meter.removed({name: start[0]})
        yield from [(stop[1] - start[1]) / max(saved, 1)] * (stop[0] - start[0])


def _slope(one: tuple[int, float], other: tuple[int, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def search(queues: Sequence[Queue], demand: Demand, meter: Meter, loss: Loss, progress: Progress) -> Taken:
    """Equal shares, then up to three moves of the budget towards groups of which a little more hurts less, measured in
    the cut model; a move is kept only if the whole model is better for it."""
    taken = uniform(queues, demand, meter)
    removed = _counter(queues, demand, meter)
    goal = removed(taken)
    best, reach = loss(taken), REACH
    for _ in range(ROUNDS):
        slopes = {
            queue.group.name: _marginal(queue, taken, best, removed, loss)
            for queue in progress.track(queues, "Searching shares")
        }
        while reach >= 0.5:
            moved = _moved(queues, taken, slopes, reach, goal, removed)
            if demand.units is None:
                moved = top_up(queues, moved, goal, meter)
            found = loss(moved) if moved != taken else best
            if found < best:
                taken, best = moved, found
                break
            reach /= 2
        else:
            break
    return taken


def _counter(queues: Sequence[Queue], demand: Demand, meter: Meter) -> Callable[[Taken], int]:
    if demand.units is None:
        return meter.removed
    return lambda taken: sum(queue.removed_after(taken[queue.group.name]) for queue in queues)


def _probe(queue: Queue) -> int:
    return max(1, round(PROBE * len(queue.steps)))


def _marginal(queue: Queue, taken: Taken, now: float, removed: Callable[[Taken], int], loss: Loss) -> float:
    """Loss per amount saved, for a few steps more from ``queue``; for a few less where it has no more to give."""
    name, steps = queue.group.name, _probe(queue)
    other = {**taken, name: min(taken[name] + steps, len(queue.steps))}
    if other == taken:
        other[name] = max(taken[name] - steps, 0)
    saved = removed(other) - removed(taken)
    return (loss(other) - now) / saved if saved else float("inf")


def _moved(
    queues: Sequence[Queue],
    taken: Taken,
    slopes: Mapping[str, float],
    reach: float,
    goal: int,
    removed: Callable[[Taken], int],
) -> Taken:
    """Give more where the slope is below a level and less where it is above, the more so the farther it is, at most
    ``reach`` probes; the level is the highest at which no more than ``goal`` goes."""
    finite = [slope for slope in slopes.values() if slope != float("inf")]
    if not finite:
        return taken
    scale = abs(median(finite)) or max(map(abs, finite)) or 1.0

    def at(level: float) -> Taken:
        found = {}
        for queue in queues:
            name = queue.group.name
            pull = min(max((level - slopes[name]) / scale, -1.0), 1.0)
            found[name] = min(max(taken[name] + round(reach * _probe(queue) * pull), 0), len(queue.steps))
        return found

    low, high = min(finite) - scale, max(finite) + scale
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(at(middle)) <= goal else (low, middle)
    return at(low)


MEASURED: Mapping[str, MeasuredAllocation] = {"sensitivity": sensitivity, "search": search}
