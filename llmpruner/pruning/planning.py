"""A plan's record of the job that it was made for, and the sizes of the model before and after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..models.numbers import stored_dtype
from ..structure.kept import parameters_after
from ..structure.plan import (
    BaseRef,
    BudgetOutcome,
    CompensationRecord,
    EstimationRecord,
    Outcome,
    PruningPlan,
    SelectionRecord,
    Target,
    cuts_of,
    structure_of,
)
from .budgets.base import BudgetSubject, counts
from .budgets.sizes import byte_cost
from .targets import scope_of, widths_of

if TYPE_CHECKING:
    from ..calibration.calibration import CalibrationSet
    from ..models.model import Model
    from ..structure.kept import Kept
    from .budgets.base import Budget, Cost
    from .job import PruneJob


def plan_of(model: Model, job: PruneJob, kept: Kept, text: CalibrationSet | None) -> PruningPlan:
    """The plan that keeps ``kept``."""
    scored = text if job.scores_read_text else None
    sources = job.calibration.text.record() if job.calibration else {}
    target = Target(by=job.by, amount=job.amount)
    if job.by == "ratio":
        target = Target(by="ratio", amount=job.amount, budget=job.budget.name, settings=job.budget.record())
    return PruningPlan(
        base=BaseRef(
            model=model.ref,
            revision=getattr(model.config, "_commit_hash", None),
            structure=structure_of(model.graph),
        ),
        family=model.family.name,
        estimation=EstimationRecord(
            criterion=job.criterion.name,
            settings=job.criterion.record(),
            reduction=job.reduction,
            calibration=scored.source if scored else None,
            sources=sources if scored else {},
            fingerprint=scored.fingerprint if scored else None,
        ),
        selection=SelectionRecord(
            kinds=job.kinds,
            layers=scope_of(job, model).layers,
            allocation=job.allocation.name,
            settings=job.allocation.record(),
            steps=job.steps,
            shape=job.shape,
            round_to=widths_of(job, model).round_to,
        ),
        compensation=_compensation(job, text, sources),
        target=target,
        seed=job.seed,
        cuts=cuts_of(model.graph, kept),
    )


def _compensation(job: PruneJob, text: CalibrationSet | None, sources: dict[str, Any]) -> CompensationRecord | None:
    compensation = job.compensation
    if compensation.name == "none":
        return None
    if text is None or not compensation.reads_text:
        return CompensationRecord(name=compensation.name, settings=compensation.record())
    samples, length = text.input_ids.shape
    return CompensationRecord(
        name=compensation.name,
        settings=compensation.record(),
        calibration=text.source,
        sources=sources,
        fingerprint=text.fingerprint,
        samples=samples,
        length=length,
    )


def outcome_of(model: Model, plan: PruningPlan, cost: Cost) -> Outcome:
    """The `Outcome` of a plan. ``model``: before the cut. ``cost``: of the plan's budget."""
    graph, target = model.graph, plan.target
    total, decoder = parameters_after(graph, plan.kept)
    left = counts(graph, plan.kept)
    weights = byte_cost(model.model, graph, [graph.by_name[name] for name in plan.cuts])
    budget = None
    if target.by == "ratio" and target.budget not in ("decoder", "parameters", "bytes"):
        whole, after = cost.remaining(), cost.remaining(*left)
        budget = BudgetOutcome(target.budget, cost.label, whole, after)
    before, memory, stored = weights.remaining(), model.model.dtype, stored_dtype(model)
    # The budget of bytes, by which the plan was made, counts those in memory.
    if target.budget != "bytes" and stored is not None and stored.itemsize < memory.itemsize:
        before = before * stored.itemsize // memory.itemsize
    return Outcome(
        graph.total_parameters, total, graph.decoder_parameters, decoder, before, weights.remaining(*left), budget
    )


def recorded_cost(model: Model, plan: PruningPlan, budget: Budget) -> Cost:
    """The cost of a plan's budget, in the model before the cut."""
    groups = [model.graph.by_name[name] for name in plan.cuts]
    return budget.cost(BudgetSubject(model.model, model.graph, groups, model.family))
