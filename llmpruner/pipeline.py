"""The story of a prune: calibrate → score → select → compensate → cut, in `prune_model`. `prune`, `plan` and
`prune_each` open the model before it, and save the result after it.

A *job* (`pruning.job`) says what is done, an `Execution` how: where weights come from, which processes share the work,
and where finished steps are kept. Whatever can be refused is refused before weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .discovery.opening import Opener, Source
from .engine.execution import Execution
from .engine.journal import Journal, recalled
from .engine.walk import CalibrationSet
from .errors import ModelError
from .models.model import Model, Structure
from .models.opening import reopened
from .models.reference import Reference
from .pruning.checks import check_job
from .pruning.compensation.base import RepairTask
from .pruning.compensation.least_squares import Fit
from .pruning.job import Job, PruneJob, ReplayJob
from .pruning.quality import compared, dense_predictions
from .pruning.saving import cut_model, outcome_of, plan_of, with_outcome
from .pruning.selection import choose
from .pruning.workspace import opened, resumable, saved, several, together
from .settings import RunSettings
from .structure.outcome import Outcome
from .structure.plan import PruningPlan


def prune_model(model: Model, job: Job, execution: Execution | None = None) -> Model:
    """Prune ``model`` in place, and return it. An exception after weights were changed leaves it ``unfinished``."""
    execution = execution or Execution(model.weights)
    text = calibrate(model, job, execution)
    plan = select(model, job, text, execution)
    plan.check(model.graph)
    outcome = outcome_of(model, plan, job.budget, text)
    dense = dense_predictions(model, plan, job, text, execution)
    with model.changing("prune"):
        fits = compensate(model, plan, job, text, execution)
        with execution.stages.stage("cut"):
            pruned = cut_model(model, plan)
        quality = compared(dense, pruned, execution)
        outcome = replace(outcome, forecast=execution.forecast, quality=quality)
        return model.become(with_outcome(pruned, outcome, fits))


def calibrate(model: Model, job: Job, execution: Execution) -> CalibrationSet | None:
    """Read the calibration text, or let the model write it; None where no component reads text."""
    text = job.calibration
    if text is None:
        return None
    with execution.stages.stage("calibration text"), model.weights.outside():
        return text.sample(model, execution, job.seed)


def select(model: Model, job: Job, text: CalibrationSet | None, execution: Execution) -> PruningPlan:
    """Score the units and choose those that stay; a replayed plan has chosen, and so may an interrupted run."""
    if isinstance(job, ReplayJob):
        job.check_text(text)
        return job.plan

    def chosen() -> dict[str, Any]:
        kept = choose(model, job, text, execution)
        return plan_of(model, job, kept, text).model_dump(mode="json")

    return PruningPlan.model_validate(recalled(execution.journal, "plan", chosen))


def compensate(
    model: Model, plan: PruningPlan, job: Job, text: CalibrationSet | None, execution: Execution
) -> Sequence[Fit]:
    """Adapt the weights that read removed units, in place."""
    if plan.compensation is None:
        return ()
    with execution.stages.stage("compensation"), torch.no_grad():
        return job.compensation.repair(RepairTask(model.network, model.graph, plan.kept, text, execution))


def prune(
    source: Source | Reference,
    job: Job,
    output: Path | None,
    opener: Opener,
    run: RunSettings,
    shared: Journal | None = None,
) -> Model:
    """Prune ``source``, and save the result to ``output``, or keep it in memory. ``shared``: of `prune_each`. Raises as
    `llmpruner.prune`."""
    structure = opener.structure(source)
    check_job(job, structure, opener)
    if output is None:
        model, execution = opened(job, structure, opener, run)
        return prune_model(model, job, execution)
    with resumable(job, structure, opener, run, output, shared) as (model, execution):
        pruned = prune_model(model, job, execution)
        pruned = saved(pruned, output, execution, "prune", {**job.given, **opener.load.given()})
    return model.become(reopened(pruned, output, trust_remote_code=opener.load.trust_remote_code))


def prune_each(
    source: Reference | Structure, jobs: Mapping[str, PruneJob], output: Path, opener: Opener, run: RunSettings
) -> list[Structure]:
    """`prune` by each of ``jobs``, which differ in the ratio alone, into the folder of ``output`` that is its key. Text
    and scores are made once, and one run of the dense model serves all fits. A run that goes on keeps the folders that
    are finished. Raises `ModelError` for a model in memory."""
    structure = opener.structure(source)
    if isinstance(structure, Model):
        raise ModelError(f"'{structure.ref}' is in memory, where the first ratio would cut it; pass its folder")
    for job in jobs.values():
        check_job(job, structure, opener)
    with several(jobs, structure, opener, run, output) as (shared, unfinished):
        run = run.model_copy(update={"restart": False})  # from now on, what is there is of this run
        if next(iter(jobs.values())).compensation.repairs_each:
            recalled(shared, "compensated", lambda: compensate_each(structure, jobs, output, opener, run, shared))
        for name, job in unfinished.items():
            opener.progress.status(f"ratio {name}")
            prune(structure, job, output / name, opener, run, shared)
    return [opener.structure(output / name) for name in jobs if (output / name).is_dir()]


def compensate_each(
    structure: Structure, jobs: Mapping[str, PruneJob], output: Path, opener: Opener, run: RunSettings, shared: Journal
) -> list[str]:
    """Do what `prune` of each of ``jobs`` does up to the cut, and keep it where that finds it. Returns their names."""
    with together(jobs, structure, opener, run, output, shared) as (model, executions):
        tasks = []
        for job, execution in zip(jobs.values(), executions.values(), strict=True):
            text = calibrate(model, job, execution)
            plan = select(model, job, text, execution)
            tasks.append(RepairTask(model.network, model.graph, plan.kept, text, execution))
        job.compensation.repair_each(tasks)
    return list(jobs)


def plan(source: Source | Reference, job: PruneJob, opener: Opener, run: RunSettings) -> tuple[PruningPlan, Outcome]:
    """The plan of `prune`, and the sizes of the model before and after the cut. Raises as `llmpruner.plan`."""
    structure = opener.structure(source)
    check_job(job, structure, opener)
    model, execution = opened(job, structure, opener, run, cuts=False)
    text = calibrate(model, job, execution)
    selected = select(model, job, text, execution)
    return selected, replace(outcome_of(model, selected, job.budget, text), forecast=execution.forecast)
