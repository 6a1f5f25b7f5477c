"""The stages of pruning in sequence: calibrate → estimate → select → compensate → cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..calibration.calibration import CalibrationSet, parse_calibration
from ..engine.ranks import Ranks
from ..errors import DataError, SelectionError
from ..progress import QUIET, Progress
from ..pruning.budgets.base import BudgetSubject
from ..pruning.budgets.costs import Cost
from ..pruning.budgets.open import open_budget
from ..pruning.compensation.base import Fit, RepairTask, fits_record
from ..pruning.compensation.choose import Chooser, can_wait
from ..pruning.criteria.estimate import check_accepted
from ..pruning.criteria.spread import Spread
from ..structure.plan import CompensationRecord, PruningPlan, cuts_of
from ..structure.scope import Scope
from .calibrating import journaled
from .choice import Choice
from .cutting import cut_by, recorded_cost
from .execution import Run
from .jobs import PruneJob
from .plan_record import plan_of
from .wanted import scope_of, widths_of

if TYPE_CHECKING:
    from ..models.model import Model, Structure
    from ..plugins.catalog import Catalog
    from ..structure.coupling import CoupledGroup, CouplingGraph
    from ..structure.kept import Kept


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
    chooser = _chooser(job, model, scope.groups(model.graph))
    journal = run.journal
    earlier = None if journal is None else journal.load("plan")
    if earlier is None:
        with run.stages.stage("budget"):
            whole, measured = _open(model, job, scope, progress, run.ranks)
    with run.stages.stage("calibration text"):
        calibration = journaled(journal, model, job, progress, run.ranks)
    if journal is not None and earlier is not None:
        return Draft(PruningPlan.model_validate(earlier), calibration, chooser, scores=journal.load("scores") or {})
    choice = Choice(model, job, scope, whole, calibration, progress, run)
    kept = choice.units(ranked=chooser is None)
    if not kept:
        raise SelectionError("the amount asked for is less than one unit of the selected groups; ask for more")
    plan = plan_of(model, job, kept, calibration, measured)
    if journal is not None:
        journal.store("scores", choice.spreads)
        journal.store("plan", plan.model_dump(mode="json"))
    return Draft(plan, calibration, chooser, whole, choice.spreads)


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
            return model.become(cut_by(model, plan, cost, work))


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
