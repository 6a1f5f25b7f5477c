"""Shares by the divergence that cuts of each group alone cause."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated

from pydantic import BeforeValidator, Field

from ...component import ComponentSettings
from ...structure.queues import Queue
from ...values import names_of
from .base import Allocation, AllocationTask, Meter, Taken
from .ranking import GlobalRanking

Share = Annotated[float, Field(gt=0, lt=1)]


class Sensitivity(Allocation):
    """The shares with the smallest sum of the divergences that cuts of each group alone cause.

    The divergence Dᵍ(n) of the model with n steps of group g removed from the current model (KL, nats per token) is
    measured at a few n and interpolated along the lower convex hull of these points. Steps are then ranked over all
    groups by divergence per saved amount, ΔDᵍ / Δsaved, lowest first. Effects of cuts of several groups in combination
    are not measured; `Search` does that.
    """

    name = "sensitivity"
    summary = "shares by the divergence that cuts of each group alone cause"
    measures = True

    class Settings(ComponentSettings):
        levels: Annotated[
            tuple[Share, ...],
            BeforeValidator(names_of),
            Field(description="Shares of a group's steps at which the divergence is measured, in addition to 1."),
        ] = (0.25, 0.5)

    settings: Settings

    def allocate(self, task: AllocationTask) -> Taken:
        assert task.loss is not None
        shares, dense = (*self.settings.levels, 1.0), task.loss({})
        ranked = []
        for queue in task.progress.track(task.queues, "Measuring groups"):
            name = queue.group.name
            levels = sorted({max(1, round(share * len(queue.steps))) for share in shares if queue.steps})
            points = [(0, 0.0), *((steps, task.loss({name: steps}) - dense) for steps in levels)]
            ranked.append(replace(queue, scores=tuple(per_saving(queue, points, task.meter))))
        return GlobalRanking().allocate(replace(task, queues=ranked))


def per_saving(queue: Queue, points: Sequence[tuple[int, float]], meter: Meter) -> Iterator[float]:
    """For every step, the increase of the divergence per saved amount. ``points``: (steps, divergence).

    On the lower convex hull of the points, so that the values never decrease and a ranking takes a group's steps in
    order.
    """
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
