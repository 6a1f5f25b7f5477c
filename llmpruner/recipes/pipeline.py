"""The stages of pruning in sequence: calibrate → estimate → select → compensate → cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..budgets.base import BudgetSubject
from ..budgets.costs import Cost, CutCost
from ..budgets.open import open_budget
from ..compensation.base import Fit, RepairTask, fits_record
from ..compensation.choose import Chooser, can_wait
from ..compensation.trials import Trials
from ..data.calibration import CalibrationSet, parse_calibration
from ..engine.boundaries import DEFAULT_LIMIT
from ..engine.executor import Executor
from ..engine.journal import Journal
from ..engine.ranks import SINGLE, Ranks
from ..engine.signals import Signal
from ..errors import DataError, SelectionError
from ..importance.estimate import Removal, Scores, check_accepted, estimate
from ..importance.spread import Spread, spread
from ..models.surgery import cut
from ..progress import QUIET, Progress
from ..selection.base import Demand
from ..selection.normalize import normalize
from ..selection.select import select
from ..selection.uniform import Uniform
from ..structure.coupling import LAYER
from ..structure.kept import compose, layer_numbers
from ..structure.plan import CompensationRecord, PruningPlan, cuts_of
from ..structure.scope import Scope
from .calibrating import journaled, scored_on
from .cutting import cut_by, recorded_cost
from .jobs import PruneJob
from .passages import passages_in
from .plan_record import plan_of
from .stages import Stages
from .wanted import demand, part_of, scope_of, widths_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..loading.model import Model, Structure
    from ..plugins.catalog import Catalog
    from ..structure.coupling import CoupledGroup, CouplingGraph
    from ..structure.kept import Kept
    from ..structure.widths import Widths


@dataclass(frozen=True)
class Draft:
    """A plan that may be preliminary: with a ``chooser``, the number of units to remove from each group is final, but
    the units are not. ``calibration``: the text of chooser and compensation; None where neither reads text."""

    plan: PruningPlan
    calibration: CalibrationSet | None = None
    chooser: Chooser | None = None
    cost: Cost | None = None
    """Of the budget; None for a plan that is replayed."""
    scores: Mapping[str, Spread] = field(default_factory=dict)
    """Group name → how the scores that chose its units are distributed. Empty as long as the units are not chosen, and
    where they are chosen in several steps."""


@dataclass(frozen=True)
class Run:
    """How stages run. ``boundary_memory``: bytes of hidden states in memory. ``journal``: keeps results for a run that
    is interrupted. ``divided``: see `Executor`. ``ranks``: the processes that share the work; the first one reads or
    writes text, measures a budget and selects, and all go on with its results. ``stages``: times them."""

    boundary_memory: int = DEFAULT_LIMIT
    journal: Journal | None = None
    divided: int = 1
    ranks: Ranks = SINGLE
    stages: Stages = field(default_factory=Stages)

    def executor(self, model: Model) -> Executor:
        """For a stage that runs ``model``."""
        folder = None if self.journal is None else self.journal.folder
        return Executor(model.weights, self.boundary_memory, folder, self.divided, self.ranks)


def make_plan(
    model: Model, job: PruneJob, progress: Progress = QUIET, run: Run | None = None
) -> tuple[PruningPlan, Cost]:
    """Estimate and select; returns the plan and the cost of the budget. The model is not changed; with several steps,
    copies of it are cut.

    To make and apply a plan, `draft_plan` and `apply_draft` give the same result with fewer passes through the model.
    """
    run = run or Run()
    draft = draft_plan(model, job, progress, run)
    assert draft.cost is not None
    if draft.chooser is None or draft.calibration is None:
        return draft.plan, draft.cost
    chosen = draft.chooser.choose_all(
        model.model, model.graph, draft.plan.kept, draft.calibration, progress, run.executor(model)
    )
    return _with_units(model.graph, draft.plan, run.ranks.from_first(lambda: chosen)), draft.cost


def draft_plan(model: Model, job: PruneJob, progress: Progress = QUIET, run: Run | None = None) -> Draft:
    """As `make_plan`, but the units may be chosen during the compensation. An interrupted run's plan and text are
    used again.

    The budget is opened first: it may have to be measured, and is refused if no unit in scope saves any of it.
    """
    run = run or Run()
    scope = scope_of(job, model)
    network, graph = model.model, model.graph
    chooser = _chooser(job, model, scope.groups(graph))
    journal = run.journal
    earlier = None if journal is None else journal.load("plan")
    if earlier is None:
        with run.stages.stage("budget"):
            whole, measured = _open(model, job, scope, progress, run.ranks)
    with run.stages.stage("calibration text"):
        calibration = journaled(journal, model, job, progress, run.ranks)
    if journal is not None and earlier is not None:
        return Draft(PruningPlan.model_validate(earlier), calibration, chooser, scores=journal.load("scores") or {})
    scored, widths = scored_on(calibration, job), widths_of(job, model)
    kept: dict[str, tuple[int, ...]] = {}
    spreads: dict[str, Spread] = {}
    # Layers that go take units of other groups with them, so that the numbers of a single step would not do.
    in_parts = job.steps > 1 and job.allocation.equal_shares and LAYER not in job.kinds
    at_once = _at_once(model.graph, scope, job, whole, widths) if in_parts else None
    for step in range(1, job.steps + 1):
        groups = scope.groups(graph)
        cost = CutCost(whole, model.graph, kept) if kept else whole
        wanted, allocation = demand(job, whole, cost, groups, scope, step), job.allocation
        if at_once is not None and step < job.steps:
            wanted, allocation = part_of(model.graph, at_once, step / job.steps, groups), Uniform()
        if chooser is not None:
            # The numbers of units do not depend on scores, and the units are chosen later.
            scores = _equal_scores(groups)
        else:
            with run.stages.stage("scores"):
                found = estimate(
                    network, graph, groups, job.criterion, scored,
                    reduction=job.reduction, seed=job.seed, progress=progress,
                    executor=run.executor(model)
                    if network is model.model
                    else Executor.of(network, graph.layers, run.ranks),
                    removal=_removal(graph, groups, scope, wanted, cost, job),
                )  # fmt: skip
            ranked = normalize(graph, graph.by_name, found.by_group, job.normalization, cost, widths.alike(groups))
            scores = Scores(ranked)
        with run.stages.stage("selection"):
            chosen = run.ranks.from_first(
                lambda: select(
                    graph, groups, scores, scope, wanted, allocation,  # noqa: B023
                    cost=cost, widths=widths,  # noqa: B023
                    loss=_loss(model, network, graph, groups, job, calibration, progress), progress=progress,  # noqa: B023
                )
            )  # fmt: skip
        if chooser is None and job.steps == 1:
            spreads = {name: spread(scores.by_group[name].tolist(), units) for name, units in chosen.items()}
        kept = compose(model.graph, kept, chosen)
        if step < job.steps:
            network = copy.deepcopy(model.model)
            graph = cut(network, model.graph, kept, model.family)
            scope = _renumbered(scope_of(job, model), model.graph, kept)
            widths = widths_of(job, model).after(model.graph, kept)
    if not kept:
        raise SelectionError("the amount asked for is less than one unit of the selected groups; ask for more")
    plan = plan_of(model, job, kept, calibration, measured)
    if journal is not None:
        journal.store("scores", spreads)
        journal.store("plan", plan.model_dump(mode="json"))
    return Draft(plan, calibration, chooser, whole, spreads)


def _equal_scores(groups: Sequence[CoupledGroup]) -> Scores:
    """All zero, for `select` where only the numbers of units matter."""
    return Scores({group.name: torch.zeros(group.units, dtype=torch.float64) for group in groups})


def _at_once(graph: CouplingGraph, scope: Scope, job: PruneJob, whole: Cost, widths: Widths) -> Kept:
    """How many units of each group a single step would keep, before scores decide which ones."""
    groups = scope.groups(graph)
    wanted = demand(job, whole, whole, groups, scope, job.steps)
    return select(graph, groups, _equal_scores(groups), scope, wanted, job.allocation, cost=whole, widths=widths)


def _removal(
    graph: CouplingGraph, groups: Sequence[CoupledGroup], scope: Scope, wanted: Demand, cost: Cost, job: PruneJob
) -> Removal | None:
    """How many layers the amount takes, for a criterion of blocks of layers, which scores nothing else."""
    if Signal.STREAM_BLOCKS not in job.criterion.signals:
        return None
    kept = select(graph, groups, _equal_scores(groups), scope, wanted, Uniform(), cost=cost)
    removed = sum(group.units - len(kept[group.name]) for group in groups if group.name in kept)
    return Removal(removed, scope.allowed_units(groups[0]))


def apply_plan(model: Model, plan: PruningPlan, catalog: Catalog, progress: Progress = QUIET) -> Model:
    """Compensate, if the plan has a compensation, and cut, in place. Calibration text is read or generated again.

    Raises `PlanError` when the plan was made for another model, `DataError` when its calibration text has changed.
    """
    return apply_draft(model, Draft(plan), catalog, progress)


def apply_draft(
    model: Model, draft: Draft, catalog: Catalog, progress: Progress = QUIET, run: Run | None = None
) -> Model:
    """`apply_plan` for a plan that may be preliminary. The last of the result's ``plans`` is the final one. The result
    is ``model`` itself; where an exception ends this after weights were changed, it is ``unfinished``."""
    plan, run, read = draft.plan, run or Run(), draft.calibration
    plan.check(model.graph)
    cost = draft.cost
    if cost is None:
        with run.stages.stage("cut"):
            cost = recorded_cost(model, plan, catalog, progress)
    fits: Sequence[Fit] = ()
    if plan.compensation is not None:
        with run.stages.stage("compensation"):
            read = _text_of(model, draft, plan.compensation, catalog, progress, run)
    with model.changing("prune"):
        if plan.compensation is not None:
            with run.stages.stage("compensation"):
                plan, fits = _compensate(model, draft, plan.compensation, read, catalog, progress, run)
        chosen = {} if draft.chooser is None else draft.chooser.scores
        work = {"fits": fits_record(fits), "scores": {**draft.scores, **chosen}}
        with run.stages.stage("cut"):
            passages = (*model.passages, *passages_in(read, model.tokenizer))
            return model.become(cut_by(replace(model, passages=passages), plan, cost, work))


def _open(
    model: Model, job: PruneJob, scope: Scope, progress: Progress, ranks: Ranks
) -> tuple[Cost, Mapping[str, Any] | None]:
    subject = BudgetSubject(model.model, model.graph, scope.groups(model.graph), model.family, progress)
    measured, cost = open_budget(job.budget, subject, scope, ranks)
    return cost, measured


def _text_of(
    model: Model, draft: Draft, how: CompensationRecord, catalog: Catalog, progress: Progress, run: Run
) -> CalibrationSet | None:
    """The text of a compensation, read or written again for a plan that is replayed; None where it reads none."""
    if draft.calibration is not None or how.calibration is None or not how.samples or not how.length:
        return draft.calibration
    text = parse_calibration(how.calibration, catalog.sources, how.source_settings)
    sample = partial(
        text.sample,
        model.model,
        model.tokenizer,
        samples=how.samples,
        length=how.length,
        seed=draft.plan.seed,
        progress=progress,
        family=model.family,
    )
    with model.weights.outside():
        calibration = run.ranks.from_first(sample)
    # Generated text depends on rounding, so that it may differ on another machine.
    if not text.writes and calibration.fingerprint != how.fingerprint:
        raise DataError(f"'{how.calibration}' is not the text that this plan was made with; make a new plan")
    return calibration


def _compensate(
    model: Model,
    draft: Draft,
    how: CompensationRecord,
    calibration: CalibrationSet | None,
    catalog: Catalog,
    progress: Progress,
    run: Run,
) -> tuple[PruningPlan, Sequence[Fit]]:
    """The plan with the units that were chosen, and what the repair did."""
    compensation, kept = catalog.compensations[how.name](**how.settings), draft.plan.kept
    task = RepairTask(
        model.model, model.graph, kept, calibration, draft.chooser, progress, run.executor(model), run.journal
    )
    with torch.no_grad():
        repaired = compensation.repair(task)
    return _with_units(model.graph, draft.plan, repaired.kept), repaired.fits


def _with_units(graph: CouplingGraph, plan: PruningPlan, kept: Kept) -> PruningPlan:
    return plan.model_copy(update={"cuts": cuts_of(graph, kept)})


def _chooser(job: PruneJob, model: Structure, groups: Sequence[CoupledGroup]) -> Chooser | None:
    """For choosing units during the compensation; None where they are chosen before, because the allocation, or a
    further step, depends on their scores."""
    if not (job.compensation.ranks_again and job.allocation.equal_shares and job.steps == 1):
        return None
    check_accepted(job.criterion, groups, model.graph)
    chooser = Chooser(job.criterion, job.reduction, widths_of(job, model), job.seed)
    return chooser if can_wait(job.criterion, model.graph, groups) else None


def _loss(
    model: Model,
    network: PreTrainedModel,
    graph: CouplingGraph,
    groups: Sequence[CoupledGroup],
    job: PruneJob,
    calibration: CalibrationSet | None,
    progress: Progress,
) -> Callable[[Kept], float] | None:
    """The loss for an allocation that measures; None for others."""
    if not job.allocation.measures or calibration is None:
        return None
    refit = job.compensation.ranks_again
    return Trials(network, graph, groups, model.family, calibration, refit=refit, progress=progress).loss


def _renumbered(scope: Scope, graph: CouplingGraph, kept: Kept) -> Scope:
    """The scope with the layer numbers of the model after the cut."""
    numbers = layer_numbers(graph, kept)

    def those(layers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(numbers[n] for n in layers if n in numbers)

    return Scope(scope.kinds, those(scope.layers), None if scope.removable is None else those(scope.removable))
