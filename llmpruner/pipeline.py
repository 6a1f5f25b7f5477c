"""The story of a prune: calibrate → score → select → compensate → cut, in `prune_model`. `prune`, `plan` and
`prune_each` open the model before it, and save the result after it.

A *job* (`pruning.job`) says what is done, an `Execution` how: where weights come from, which processes share the work,
and where finished steps are kept. Whatever can be refused is refused before weights are read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch

from .calibration.calibration import CalibrationSet
from .discovery.opening import Opener, Source
from .engine.execution import Execution
from .engine.journal import Journal, recalled
from .engine.ranks import Ranks
from .engine.stages import write_run
from .files import check_new_directory, check_space
from .models.model import Model, Structure
from .models.opening import reopened
from .progress import QUIET
from .pruning.checks import check_job, identity
from .pruning.compensation.base import RepairTask
from .pruning.compensation.least_squares import Fit
from .pruning.forecast import Forecast, forecast
from .pruning.job import Job, ReplayJob, job_of, prune_job
from .pruning.quality import compared, dense_predictions
from .pruning.saving import cut_model, outcome_of, plan_of, save
from .pruning.selection import choose
from .settings import PruneSettings, RunSettings
from .structure.plan import Outcome, PruningPlan

_LOG = logging.getLogger("llmpruner")


def prune_model(model: Model, job: Job, execution: Execution | None = None, expected: Forecast | None = None) -> Model:
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
        ahead = None if expected is None else asdict(expected)
        outcome = replace(outcome, forecast=ahead, quality=compared(dense, pruned, execution))
        work: dict[str, Any] = {"fits": [asdict(fit) for fit in fits]}
        work |= {name: asdict(value) for name in ("tokens", "quality") if (value := getattr(outcome, name)) is not None}
        return model.become(replace(pruned, work=(*model.work, work), outcome=outcome))


def calibrate(model: Model, job: Job, execution: Execution) -> CalibrationSet | None:
    """Read the calibration text, or let the model write it; None where no component reads text."""
    text = job.calibration
    if text is None:
        return None
    with execution.stages.stage("calibration text"), model.weights.outside():
        return text.sample("calibration", model, execution, text.samples, job.seed)


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
        return job.compensation.repair(RepairTask(model.model, model.graph, plan.kept, text, execution))


def prune(
    source: Source,
    what: PruneSettings | PruningPlan,
    output: Path | None,
    opener: Opener,
    run: RunSettings,
    options: Mapping[str, Any],
    shared: Journal | None = None,
) -> Model:
    """Prune ``source`` by settings or by a plan, and save the result to ``output`` (None: keep it in memory).
    ``options``: what the user set, for ``run.json``. ``shared``: of `prune_each`. Raises as `llmpruner.prune`."""
    ranks = Ranks.current()
    opener = opener.of_ranks(ranks)
    job = job_of(what, opener.catalog)
    if output is not None:
        ranks.from_first(lambda: check_new_directory(output))
    structure, expected = _check_and_forecast(job, source, opener, run, ranks, saves=True, in_memory=output is None)
    if output is None:
        model = opener.weights(structure, streamed=expected.streamed)
        return prune_model(model, job, Execution(model.weights, ranks, progress=opener.progress), expected)
    if ranks.first and not opener.has_tokenizer(structure):
        _LOG.warning(f"model '{structure.ref}' has no tokenizer, so the pruned model can't read text either")
    opener.say_widened(structure)
    folder = output.with_name(output.name + ".pruning")
    journal = None
    if not isinstance(structure, Model):  # a model in memory may have been read from anywhere
        journal = Journal(folder, identity(what, job, structure, opener), ranks)
    progress = QUIET if shared else opener.progress
    with journal.running(progress, anew=run.restart) if journal else nullcontext():
        written = ranks.from_first(lambda: sum(f.stat().st_size for f in folder.rglob("*")) if journal else 0)
        ranks.from_first(lambda: check_space(output, expected.disk - written, "temporary files and the result"))
        # The result's files depend on it, so a run that goes on reads weights as it did, whatever memory is free now.
        streamed = recalled(journal, f"streamed-{run.max_memory}", lambda: expected.streamed)
        model = opener.weights(structure, streamed=streamed, scratch=folder)
        execution = Execution(model.weights, ranks, journal, opener.progress, shared=shared or journal)
        pruned = prune_model(model, job, execution, replace(expected, streamed=streamed))
        opener.progress.status("saving")
        with execution.stages.stage("saving"):
            form = ranks.from_first(lambda: save(pruned, output))
        if ranks.first:
            write_run(output, execution.stages, "prune", structure.ref, {**options, **opener.load.given()})
    return model.become(reopened(replace(pruned, form=form), output, trust_remote_code=opener.load.trust_remote_code))


def prune_each(
    source: str | Path | Structure, sizes: Mapping[str, PruneSettings], output: Path, opener: Opener, run: RunSettings
) -> list[Structure]:
    """`prune` by each of ``sizes``, settings that differ in the ratio alone, into the folder of ``output`` that is
    their key. Text and scores are made once. A run that goes on keeps the folders that are finished."""
    ranks = Ranks.current()
    opener = opener.of_ranks(ranks)
    folder = output.with_name(output.name + ".pruning")
    if run.restart or not ranks.from_first(folder.is_dir):
        ranks.from_first(lambda: check_new_directory(output))
    jobs = [job_of(settings, opener.catalog) for settings in sizes.values()]
    structure = opener.structure(source)
    for job in jobs:
        check_job(job, structure, opener)
    first = next(iter(sizes.values()))
    journal = Journal(folder, {**identity(first, jobs[0], structure, opener), "sizes": list(sizes)}, ranks)
    with journal.running(opener.progress, anew=run.restart):
        if ranks.from_first(lambda: not journal.kept):
            ranks.from_first(lambda: check_new_directory(output))
            journal.store("sizes", list(sizes))  # marks the folders in ``output`` as those of this run
        ranks.from_first(lambda: output.mkdir(exist_ok=True))
        try:
            for name, settings in sizes.items():
                if ranks.from_first((output / name).exists):
                    opener.progress.status(f"{output / name} is finished")
                    continue
                opener.progress.status(f"ratio {name}")
                prune(structure, settings, output / name, opener, run, settings.given(), journal)
        finally:
            if ranks.first:
                with suppress(OSError):  # not empty
                    output.rmdir()
    return [opener.structure(output / name) for name in sizes if (output / name).is_dir()]


def plan(source: Source, settings: PruneSettings, opener: Opener, run: RunSettings) -> tuple[PruningPlan, Outcome]:
    """The plan of `prune`, and the sizes of the model before and after the cut. Raises as `llmpruner.plan`."""
    ranks = Ranks.current()
    opener = opener.of_ranks(ranks)
    job = prune_job(settings, opener.catalog)
    structure, expected = _check_and_forecast(job, source, opener, run, ranks, saves=False)
    ranks.from_first(lambda: check_space(Path(gettempdir()) / "llmpruner", expected.disk, "hidden states"))
    model = opener.weights(structure, streamed=expected.streamed)
    execution = Execution(model.weights, ranks, progress=opener.progress)
    text = calibrate(model, job, execution)
    selected = select(model, job, text, execution)
    return selected, replace(outcome_of(model, selected, job.budget, text), forecast=asdict(expected))


def _check_and_forecast(
    job: Job, source: Source, opener: Opener, run: RunSettings, ranks: Ranks, *, saves: bool, in_memory: bool = False
) -> tuple[Structure, Forecast]:
    """Check the job against the structure of the model, and show what the run will take, and how weights are read."""
    structure = opener.structure(source)
    check_job(job, structure, opener)
    expected = ranks.from_first(
        lambda: forecast(job, structure, opener, run.max_memory, saves=saves, in_memory=in_memory)
    )
    opener.progress.status(str(expected))
    return structure, expected
