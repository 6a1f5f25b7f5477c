"""Shares by search: moved between groups while the divergence of the cut model decreases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from pydantic import Field

from ...component import ComponentSettings
from ...structure.queues import Queue
from .allocate import top_up
from .base import Allocation, AllocationTask, Demand, Taken
from .uniform import Uniform

Removed = Callable[[Taken], int]
"""Removal steps → removed amount of the cost."""


class Search(Allocation):
    """Equal shares, then moved from groups where further cuts increase the divergence much to groups where they
    increase it little, with the total amount unchanged.

    With D(t) the divergence of the model after the steps t from the current model (KL, nats per token), a round
    measures for every group the marginal loss (D(t + p steps) − D(t)) / (amount that these p steps save), then moves
    all shares at once towards groups of low marginal loss. The move is kept only if D decreases; otherwise its reach is
    halved and it is tried again. So cuts of several groups are evaluated in combination, at the requested amount, as in
    the searches of ZipLM (Kurtic et al., 2023) and Týr-the-Pruner (Li et al., 2024). The measured loss is never higher
    than that of `Uniform`. Where shares of units are asked for, the amount that equal shares save stays: a head is not
    worth one MLP channel.
    """

    name = "search"
    summary = "equal shares, moved to where cuts increase the divergence least in combination (minutes more)"
    measures = True
    shares_once = True

    class Settings(ComponentSettings):
        rounds: int = Field(3, ge=1, description="Maximum number of moves; each measures every group once.")
        probe: float = Field(
            0.05, gt=0, le=1, description="Share of a group's steps that is added to measure its marginal loss."
        )
        reach: float = Field(4.0, ge=0.5, description="Maximum change in one group by the first move, in probes.")

    settings: Settings

    def allocate(self, task: AllocationTask) -> Taken:
        assert task.loss is not None
        taken = Uniform().allocate(task)
        removed = task.meter.removed
        goal = removed(taken)
        same = replace(task, demand=Demand(amount=goal, meet=task.demand.meet))
        best, reach = task.loss(taken), self.settings.reach
        for _ in range(self.settings.rounds):
            slopes = {
                queue.group.name: self._marginal(queue, taken, best, removed, task.loss)
                for queue in task.progress.track(task.queues, "Searching shares")
            }
            while reach >= 0.5:
                moved = top_up(same, self._moved(task.queues, taken, slopes, reach, goal, removed))
                found = task.loss(moved) if moved != taken else best
                if found < best:
                    taken, best = moved, found
                    break
                reach /= 2
            else:
                break
        return taken

    def _probe(self, queue: Queue) -> int:
        return max(1, round(self.settings.probe * len(queue.steps)))

    def _marginal(
        self, queue: Queue, taken: Taken, now: float, removed: Removed, loss: Callable[[Taken], float]
    ) -> float:
        """Increase of the loss per saved amount with one more probe from ``queue``, or with one less where all its
        steps are taken. Infinite where that saves nothing."""
        name, steps = queue.group.name, self._probe(queue)
        other = {**taken, name: min(taken[name] + steps, len(queue.steps))}
        if other == taken:
            other[name] = max(taken[name] - steps, 0)
        saved = removed(other) - removed(taken)
        return (loss(other) - now) / saved if saved else float("inf")

    def _moved(
        self,
        queues: Sequence[Queue],
        taken: Taken,
        slopes: Mapping[str, float],
        reach: float,
        goal: int,
        removed: Removed,
    ) -> Taken:
        """More steps where the marginal loss is below a level and fewer where it is above, in proportion to the
        distance, at most ``reach`` probes. The level is the highest at which at most ``goal`` is removed."""
        finite = [slope for slope in slopes.values() if slope != float("inf")]
        if not finite:
            return taken
        scale = abs(median(finite)) or max(map(abs, finite)) or 1.0

        def at(level: float) -> Taken:
            found = {}
            for queue in queues:
                name = queue.group.name
                pull = min(max((level - slopes[name]) / scale, -1.0), 1.0)
                found[name] = min(max(taken[name] + round(reach * self._probe(queue) * pull), 0), len(queue.steps))
            return found

        low, high = min(finite) - scale, max(finite) + scale
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if removed(at(middle)) <= goal else (low, middle)
        return at(low)
