"""Allocation: how many units each coupled group loses. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...component import Component
from ...progress import QUIET, Progress
from ...settings import Meet
from ...structure.coupling import LAYER, CoupledGroup
from ...structure.queues import Queue
from ..budgets.costs import Cost

Taken = dict[str, int]
"""Group name → number of removal steps taken from the group's queue, in order."""


@dataclass(frozen=True)
class Demand:
    """What must be removed: an ``amount`` of a cost, as in `Cost.remaining` (parameters, bytes …); or ``units``: group
    name → number of units, which need not be whole. ``meet``: how an amount is met that steps do not give exactly:
    ``nearest`` to it, at least it (``above``) or at most it (``below``). ``whole``: in all but the last of several
    cuts (``--steps``), the amount that this one and those to come remove together. What this one leaves is added to the
    amount of the next one, so that a unit that is too large for one cut can be left to a later one."""

    amount: int | None = None
    units: Mapping[str, float] | None = None
    meet: Meet = "nearest"
    whole: int | None = None


class Meter:
    """Computes the amount of a cost that removal steps save."""

    def __init__(self, cost: Cost, queues: Sequence[Queue]) -> None:
        self.cost, self._queues = cost, queues
        self._dense = cost.remaining()

    def removed(self, taken: Mapping[str, int]) -> int:
        """The amount of the cost that ``taken`` steps of each queue remove, in the units of `Cost.remaining`; missing
        groups lose none."""
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
    """The inputs of an allocation.

    ``queues``: the removal steps of every group in scope, least important first, each with its mean score.
    ``demand``: what must be removed. ``meter``: computes the removed amount. ``loss``: for allocations that measure,
    the mean KL divergence per token, in nats, of the cut model from the current one on calibration text; else None.
    """

    queues: Sequence[Queue]
    demand: Demand
    meter: Meter
    loss: Callable[[Taken], float] | None = None
    progress: Progress = QUIET


@dataclass(frozen=True)
class AllocationUse:
    """What an allocation is used with. ``model``: the reference. ``structure``: SHA-256 over names and shapes of its
    parameters. ``files``: what identifies its weights; None where they are in memory. ``criterion``, ``compensation``:
    their names."""

    model: str
    structure: str
    files: str | None
    criterion: str
    compensation: str


class Allocation(Component):
    """Decides how many removal steps are taken from each group so that the demand is met.

    `llmpruner` has functions for implementations: `target_of` refuses a demand that cannot be met,
    `take_if_it_fits` takes one step, `top_up` adds single steps up to the requested amount.
    """

    kind: ClassVar[str] = "allocation"
    measures: ClassVar[bool] = False
    """Whether it calls ``task.loss``, which needs calibration text."""
    compares_groups: ClassVar[bool] = False
    """Whether scores of different groups are compared, so that ``--normalize`` has an effect."""
    one_step: ClassVar[bool] = False
    """Whether what it uses was measured on the model before the first cut, so that ``--steps`` is refused."""
    equal_shares: ClassVar[bool] = False
    """Whether the numbers of units do not depend on scores, but for which group loses the last unit; a compensation may
    choose the units then."""
    shares_once: ClassVar[bool] = False
    """Whether with ``--steps`` the numbers of units are decided once, for the whole amount, and each step takes a part
    of them; so it is where there are ``equal_shares``. Otherwise, `allocate` is called in every step for its amount."""

    def check(self, groups: Sequence[CoupledGroup]) -> None:
        """Raise `SelectionError` where it cannot be used for ``groups``; called before weights are read. Does nothing
        by default."""

    def doubts(self, use: AllocationUse) -> Sequence[str]:
        """Lines for the user about a use that is possible, but perhaps a mistake; called before weights are read. None
        by default."""
        del use
        return ()

    def allocate(self, task: AllocationTask) -> Taken:
        """Steps to take from each queue (by group name). Raises `SelectionError` when the demand cannot be met."""
        raise NotImplementedError
