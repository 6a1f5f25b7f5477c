"""The choice of the units that are removed, in one step or several: scores, then an allocation of the amount."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ..calibration.calibration import CalibrationSet
from ..engine.execution import Execution
from ..engine.signals import GRADIENTS, Signal
from ..models.surgery import cut
from ..structure.coupling import LAYER
from ..structure.kept import compose, layer_numbers
from ..structure.scope import Scope
from .allocation import Demand, Uniform
from .budgets.base import Cost, CutCost
from .compensation.choose import Chooser, can_wait
from .criteria.estimate import Removal, Scores, estimate
from .job import PruneJob
from .selection import Spread, select, spread
from .targets import demand, lost, part_of, scope_of, widths_of
from .trials import trial_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..models.model import Model
    from ..structure.coupling import CoupledGroup, CouplingGraph
    from ..structure.kept import Kept
    from ..structure.widths import Widths

GRADIENT_TOKENS = 32768
"""Calibration tokens for scores that need gradients, where a compensation reads more text."""


def scored_on(text: CalibrationSet | None, job: PruneJob) -> CalibrationSet | None:
    """The part of the calibration text for scores: all of it, but `GRADIENT_TOKENS` tokens for gradients, which take
    more time."""
    if text is None or not job.compensation.ranks_again or not job.criterion.signals & GRADIENTS:
        return text
    return text.first(GRADIENT_TOKENS)


def waiting_chooser(job: PruneJob, model: Model) -> Chooser | None:
    """For choosing units during the compensation; None where they are chosen before, because the allocation, or a
    further step, depends on their scores."""
    groups = scope_of(job, model).groups(model.graph)
    waits = job.compensation.ranks_again and job.allocation.equal_shares and job.steps == 1
    if not (waits and can_wait(job.criterion, model.graph, groups)):
        return None
    return Chooser(job.criterion, job.reduction, widths_of(job, model), job.seed)


@dataclass
class _Current:
    """The model after the steps so far: before the first one itself, then a copy that is cut. ``cost``: of what is
    left. ``ranked``: group name → scores that the allocation compares; empty until they are known. ``loss``: of
    trial cuts, once an allocation measures."""

    network: PreTrainedModel
    graph: CouplingGraph
    scope: Scope
    widths: Widths
    cost: Cost
    ranked: Mapping[str, torch.Tensor] = field(default_factory=dict)
    loss: Callable[[Kept], float] | None = None

    @cached_property
    def groups(self) -> tuple[CoupledGroup, ...]:
        return self.scope.groups(self.graph)


class Choice:
    """Chooses the units of ``model`` that ``job`` removes. ``whole``: the cost of the model; ``text``: for scores and
    trials. With several steps, copies of the model are cut."""

    def __init__(
        self,
        model: Model,
        job: PruneJob,
        whole: Cost,
        text: CalibrationSet | None,
        execution: Execution,
    ) -> None:
        self.model, self.job, self.whole, self.text, self.execution = model, job, whole, text, execution
        self.kept: Kept = {}
        """By the steps so far, in numbers of the model before the first one."""
        self.spreads: dict[str, Spread] = {}
        """Group name → how its scores are distributed; empty with several steps."""
        self.now = _Current(model.model, model.graph, scope_of(job, model), widths_of(job, model), whole)

    def units(self, *, ranked: bool) -> Kept:
        """Group name → kept units. ``ranked``: by scores; otherwise only their numbers are right."""
        job, text, stages = self.job, scored_on(self.text, self.job), self.execution.stages
        # A group of layers alone loses as many as the amounts of all steps so far come to.
        once = job.steps > 1 and job.allocation.equal_shares and set(job.kinds) != {LAYER}
        numbers: dict[str, float] = {}
        for step in range(1, job.steps + 1):
            now, last = self.now, step == job.steps
            wanted = demand(job, self.whole, now.cost, now.groups, now.scope, step)
            if ranked:
                with stages.stage("scores"):
                    self._rank(wanted, text)
            else:
                now.ranked = _equal_scores(now.groups).by_group
            with stages.stage("selection"):
                if once and step == 1:
                    all_of_it = demand(job, self.whole, self.whole, now.groups, now.scope, job.steps)
                    numbers = lost(now.graph, now.groups, self._select(all_of_it))
                chosen = None
                if once and not last:
                    part = part_of(self.model.graph, self.kept, numbers, step / job.steps, now.groups)
                    chosen = self._select(part, decided=True)
                if chosen is None or self._is_more_than_all(chosen, wanted):
                    chosen = self._select(wanted)
            if ranked and job.steps == 1:
                self.spreads = {name: spread(now.ranked[name].tolist(), units) for name, units in chosen.items()}
            self.kept = compose(self.model.graph, self.kept, chosen)
            # Where a step removed nothing, as its amount was less than the next unit, its scores hold for the next one.
            if chosen and not last:
                self.now = self._cut()
        return self.kept

    def _cut(self) -> _Current:
        model, job, kept = self.model, self.job, self.kept
        network = copy.deepcopy(model.model)
        graph = cut(network, model.graph, kept, model.family)
        scope = _renumbered(scope_of(job, model), model.graph, kept)
        widths = widths_of(job, model).after(model.graph, kept)
        return _Current(network, graph, scope, widths, CutCost(self.whole, model.graph, kept))

    def _rank(self, wanted: Demand, text: CalibrationSet | None) -> None:
        """Set the scores, unless they are set and do not depend on the amount."""
        now, job, execution = self.now, self.job, self.execution
        removal = self._removal(wanted)
        if now.ranked and removal is None:
            return
        if now.network is not self.model.model:
            execution = execution.of_copy(now.network, now.graph.layers)
        scores = estimate(
            now.network, now.graph, now.groups, job.criterion, text,
            reduction=job.reduction, seed=job.seed, execution=execution, removal=removal,
        )  # fmt: skip
        alike = now.widths.alike(now.groups)
        now.ranked = job.allocation.comparable(scores.by_group, now.graph, now.cost, alike)

    def _select(self, wanted: Demand, *, decided: bool = False) -> Kept:
        """By the job's allocation. ``decided``: ``wanted`` has the number of units of each group."""
        now = self.now

        def chosen() -> Kept:
            return select(
                now.graph, now.groups, Scores(now.ranked), now.scope, wanted,
                Uniform() if decided else self.job.allocation,
                cost=now.cost, widths=now.widths, loss=None if decided else self._loss(),
                progress=self.execution.progress,
            )  # fmt: skip

        return self.execution.ranks.from_first(chosen)

    def _is_more_than_all(self, chosen: Kept, wanted: Demand) -> bool:
        """Whether a part removes more than the whole amount, as layers that cost more go than those whose number was
        decided."""
        if wanted.whole is None or not chosen:
            return False
        graph = self.model.graph
        after = CutCost(self.whole, graph, compose(graph, self.kept, chosen))
        return self.now.cost.remaining() - after.remaining() > wanted.whole

    def _removal(self, wanted: Demand) -> Removal | None:
        """How many layers the amount takes, for a criterion of blocks of layers, which scores nothing else."""
        if Signal.STREAM_BLOCKS not in self.job.criterion.signals:
            return None
        now, groups = self.now, self.now.groups
        kept = select(now.graph, groups, _equal_scores(groups), now.scope, wanted, Uniform(), cost=now.cost)
        removed = sum(group.units - len(kept[group.name]) for group in groups if group.name in kept)
        return Removal(removed, now.scope.allowed_units(groups[0]))

    def _loss(self) -> Callable[[Kept], float] | None:
        """The loss for an allocation that measures; None for others."""
        now = self.now
        if now.loss is None and self.job.allocation.measures and self.text is not None:
            kinds = {group.kind for group in now.groups}
            now.loss = trial_loss(now.network, now.graph, kinds, self.model.family, self.text)
        return now.loss


def _equal_scores(groups: Sequence[CoupledGroup]) -> Scores:
    """All zero, for `select` where only the numbers of units matter."""
    return Scores({group.name: torch.zeros(group.units, dtype=torch.float64) for group in groups})


def _renumbered(scope: Scope, graph: CouplingGraph, kept: Kept) -> Scope:
    """The scope with the layer numbers of the model after the cut."""
    numbers = layer_numbers(graph, kept)

    def those(layers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(numbers[n] for n in layers if n in numbers)

    return Scope(scope.kinds, those(scope.layers), None if scope.removable is None else those(scope.removable))
