"""Allocation: how many units each coupled group gives up. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..budgets.costs import Cost
from ..component import Component
from ..progress import QUIET, Progress
from ..structure.coupling import LAYER
from ..structure.queues import Queue

Taken = dict[str, int]
"""Group name → number of steps taken from the front of the group's queue."""


@dataclass(frozen=True)
class Demand:
    """What must be removed: an ``amount`` in whole units of a cost, or numbers of units (``units``: group name → how
    many, which need not be whole)."""

    amount: int | None = None
    units: Mapping[str, float] | None = None


class Meter:
    """Counts how much of a cost a choice of steps removes."""

    def __init__(self, cost: Cost, queues: Sequence[Queue]) -> None:
        self.cost, self._queues = cost, queues
        self._dense = cost.remaining()

    def removed(self, taken: Mapping[str, int]) -> int:
        """The amount of the cost that is removed with ``taken`` steps of each queue; missing groups give none."""
        kept: dict[str, int] = {}
        gone: set[int] = set()
        for queue in self._queues:
            steps = taken.get(queue.group.name, 0)
            if queue.group.kind == LAYER:
                gone.update(unit for step in queue.steps[:steps] for unit in step)
            elif steps:
                kept[queue.group.name] = queue.group.units - queue.removed_after(steps)
        return self._dense - self.cost.remaining(kept, gone)


@dataclass(frozen=True)
class AllocationTask:
    """What an allocation decides on.

    ``queues``: the removal steps of every group in scope, least important first, each with its mean score.
    ``demand``: what must be removed. ``meter``: counts what a choice removes. ``loss``: for allocations that measure,
    the mean KL divergence per token, in nats, of the model cut to a choice from the model as it is, on calibration
    text; None for others.
    """

    queues: Sequence[Queue]
    demand: Demand
    meter: Meter
    loss: Callable[[Taken], float] | None = None
    progress: Progress = QUIET


class Allocation(Component):
    """Decides how many removal steps each group gives so that the demand is met.

    `llmpruner.selection.allocate` has what implementations share: `target_of` refuses a demand that cannot be met,
    `take_if_it_fits` takes one step, `top_up` closes the last gap with single steps.
    """

    kind: ClassVar[str] = "allocation"
    measures: ClassVar[bool] = False
    """Whether it calls ``task.loss``, which needs calibration text."""
    compares_groups: ClassVar[bool] = False
    """Whether scores of different groups are compared, so that ``--normalize`` has an effect."""
    equal_shares: ClassVar[bool] = False
    """Whether how many units a group gives hardly depends on scores; a compensation may then rank units anew."""

    def allocate(self, task: AllocationTask) -> Taken:
        """Steps to take from each queue (by group name). Raises `SelectionError` when the demand cannot be met."""
        raise NotImplementedError
