"""Allocation: how many units each coupled group loses, by equal shares (`Uniform`), one ranking of all units
(`GlobalRanking`) or measured divergence (`Sensitivity`). `top_up` helps to implement others. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ..component import Component, ComponentSettings
from ..progress import QUIET, Progress
from ..structure.coupling import LAYER, VOCABULARY, CouplingGraph
from ..structure.scope import Queue
from ..values import names_of
from .budgets import Cost

if TYPE_CHECKING:
    import torch

Taken = dict[str, int]
"""Group name → number of removal steps taken from the group's queue, in order."""


class Meter:
    """What removal steps save of a cost. ``members``: queue name → the queues of groups with these steps."""

    def __init__(self, cost: Cost, members: Mapping[str, Sequence[Queue]]) -> None:
        self.cost, self._members, self._dense = cost, members, cost.remaining()

    def removed(self, taken: Mapping[str, int]) -> int:
        """What ``taken`` steps of each queue remove, in the units of `Cost.remaining`; missing queues lose none."""
        kept: dict[str, int] = {}
        gone: set[int] = set()
        for name, steps in taken.items():
            for queue in self._members[name] if steps else ():
                if queue.group.kind == LAYER:
                    gone.update(unit for step in queue.steps[:steps] for unit in step)
                else:
                    kept[queue.group.name] = queue.group.units - queue.removed_after(steps)
        return self._dense - self.cost.remaining(kept, gone)


@dataclass(frozen=True)
class AllocationTask:
    """The inputs of an allocation. ``queues``: the removal steps of every group in scope, least important first, with
    mean scores; groups that must keep the same number of units share one queue, named after the first. ``amount``: to
    remove, in the units of `Cost.remaining`. ``meter``: computes the removed amount. ``whole``: in all but the last of
    several cuts (``--steps``), the amount of this one and those to come, which has room for a unit that is too large
    now. ``loss``: for allocations that measure, the mean KL divergence of a cut model in nats per token."""

    queues: Sequence[Queue]
    amount: int
    meter: Meter
    whole: int | None = None
    loss: Callable[[Taken], float] | None = None
    progress: Progress = QUIET


class Allocation(Component):
    """Decides how many removal steps are taken from each group so that the amount is removed."""

    kind: ClassVar[str] = "allocation"
    hook: ClassVar[str] = "llmpruner_allocations"
    measures: ClassVar[bool] = False
    """Whether it calls ``task.loss``, which needs calibration text."""
    equal_shares: ClassVar[bool] = False
    """Whether numbers of units depend on scores in the last unit alone. They are decided once then with ``--steps``;
    otherwise `allocate` is called in every step."""

    def allocate(self, task: AllocationTask) -> Taken:
        """Steps to take from each queue (by group name)."""
        raise NotImplementedError

    def comparable(self, scores: Mapping[str, torch.Tensor], graph: CouplingGraph) -> Mapping[str, torch.Tensor]:
        """``scores`` (group name → score of each unit) on one scale for all groups; by default as they are."""
        return scores


def _take_if_it_fits(task: AllocationTask, taken: Taken, name: str) -> bool:
    """Add one step of group ``name`` to ``taken`` if that removes something and fits; returns whether it was added."""
    before = task.meter.removed(taken)
    taken[name] += 1
    if before < task.meter.removed(taken) <= task.amount:
        return True
    taken[name] -= 1
    return False


def top_up(task: AllocationTask, taken: Taken) -> Taken:
    """Add single steps to ``taken``, of all queues in turn where they fit, until the removed amount is as near to the
    requested one as one step allows; at last one step beyond it if that is nearer. Returns ``taken``."""
    steps = {queue.group.name: len(queue.steps) for queue in task.queues}
    moved = True
    while moved:
        moved = False
        for name, most in steps.items():
            if taken[name] < most:
                moved |= _take_if_it_fits(task, taken, name)
    gap = task.amount - task.meter.removed(taken)
    left = [name for name, most in steps.items() if taken[name] < most]
    beyond = {name: task.meter.removed({**taken, name: taken[name] + 1}) - task.amount for name in left}
    nearer = [name for name in left if 0 < beyond[name] < gap]
    if nearer:
        taken[min(nearer, key=beyond.__getitem__)] += 1
    return taken


class Uniform(Allocation):
    """The same share s of the units of every group (block-wise pruning of LLM-Pruner; Ma, Fang, Wang, 2023): the
    largest that removes at most the requested amount, rounded to whole steps in each group. The remainder is filled
    with the steps between s and the next larger share, lowest score first, and then with any (`top_up`)."""

    name = "uniform"
    summary = "the same share of the units of every group"
    equal_shares = True

    def allocate(self, task: AllocationTask) -> Taken:
        queues, meter = task.queues, task.meter

        def at(share: float) -> Taken:
            return {q.group.name: q.steps_for(share * q.group.units) for q in queues}

        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if meter.removed(at(middle)) <= task.amount else (low, middle)
        taken, upper = at(low), at(high)
        pending = [
            (queue.scores[n], queue.group.name)
            for queue in queues
            for n in range(taken[queue.group.name], upper[queue.group.name])
        ]
        for _, name in sorted(pending):
            _take_if_it_fits(task, taken, name)
        return top_up(task, taken)


Normalization = Literal["none", "mean", "max", "sum", "zscore", "parameters"]


class GlobalRanking(Allocation):
    """All steps of all groups in one order, lowest score first, up to the requested amount; `top_up` takes the last. A
    group whose next step does not fit loses no more. Where further cuts follow (`AllocationTask.whole`), a cut ends at
    a step that only the whole amount has room for."""

    name = "global"
    summary = "one ranking of the units of all groups, lowest score first"

    class Settings(ComponentSettings):
        normalize: Normalization = Field(
            "none",
            description="What scores of a group are divided by: their mean, max or sum; the parameters of a unit. "
            "zscore: less their mean, by their deviation, as in FLAP.",
        )

    settings: Settings

    def comparable(self, scores: Mapping[str, torch.Tensor], graph: CouplingGraph) -> Mapping[str, torch.Tensor]:
        sizes = {name: graph.parameters_per_unit(graph.by_name[name]) for name in scores}
        return {name: normalized(values, self.settings.normalize, sizes[name]) for name, values in scores.items()}

    def allocate(self, task: AllocationTask) -> Taken:
        steps = [(score, number, q.group.name) for number, q in enumerate(task.queues) for score in q.scores]
        order = [name for *_, name in sorted(steps)]

        def first(count: int) -> Taken:
            counted = Counter(order[:count])
            return {queue.group.name: counted[queue.group.name] for queue in task.queues}

        start, above = 0, len(order) + 1
        while above - start > 1:
            middle = (start + above) // 2
            start, above = (middle, above) if task.meter.removed(first(middle)) <= task.amount else (start, middle)
        taken, full = first(start), set[str]()
        for name in order[start:]:
            if name in full or _take_if_it_fits(task, taken, name):
                continue
            if task.whole is not None:
                more = {**taken, name: taken[name] + 1}
                before, after = task.meter.removed(taken), task.meter.removed(more)
                if before < after <= task.whole:
                    return more if after - task.amount < task.amount - before else taken
            full.add(name)
        return taken if task.whole is not None else top_up(task, taken)


def normalized(values: torch.Tensor, normalization: Normalization, parameters: int) -> torch.Tensor:
    """Scores of a group, (units,), divided as ``normalize`` of `GlobalRanking` says. ``parameters``: of one unit."""
    tiny = 1e-300
    if normalization == "none":
        return values
    if normalization == "parameters":
        return values / max(parameters, 1)
    if normalization == "zscore":
        return (values - values.mean()) / values.std(correction=0).clamp_min(tiny)
    size: torch.Tensor = getattr(values.abs(), normalization)()  # mean, max or sum
    return values / size.clamp_min(tiny)


class Sensitivity(Allocation):
    """The shares with the smallest sum of the divergences that cuts of each group alone cause. The divergence Dᵍ(n) of
    the model without n steps of group g from the current model (KL, nats per token) is measured at a few n, and
    interpolated along their lower convex hull. Steps of all groups are ranked by ΔDᵍ / Δsaved, lowest first."""

    name = "sensitivity"
    summary = "shares by the divergence that cuts of each group alone cause"
    measures = True

    class Settings(ComponentSettings):
        levels: Annotated[
            tuple[Annotated[float, Field(gt=0, lt=1)], ...],
            BeforeValidator(names_of),
            Field(description="Shares of a group's steps at which the divergence is measured, in addition to 1."),
        ] = (0.25, 0.5)

    settings: Settings

    def allocate(self, task: AllocationTask) -> Taken:
        assert task.loss is not None
        ranked = []
        for queue in task.progress.track(task.queues, "Measuring groups"):
            name, shares = queue.group.name, (*self.settings.levels, 1.0)
            if queue.group.kind == VOCABULARY:  # no model is run for it, and most of its tokens cost nearly nothing
                shares = tuple(n / 64 for n in range(1, 65))
            levels = sorted({max(1, round(share * len(queue.steps))) for share in shares if queue.steps})
            points = [(0, 0.0), *((steps, task.loss({name: steps})) for steps in levels)]
            scores: list[float] = []
            for (start, low), (stop, high) in pairwise(_lower_hull(points)):
                saved = task.meter.removed({name: stop}) - task.meter.removed({name: start})
                scores += [(high - low) / max(saved, 1)] * (stop - start)
            ranked.append(replace(queue, scores=tuple(scores)))
        return GlobalRanking().allocate(replace(task, queues=ranked))


def _lower_hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lower convex hull of ``points`` in ascending order, so that a ranking takes a group's steps in order."""

    def slope(a: tuple[int, float], b: tuple[int, float]) -> float:
        return (b[1] - a[1]) / (b[0] - a[0])

    hull: list[tuple[int, float]] = []
    for point in points:
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull
