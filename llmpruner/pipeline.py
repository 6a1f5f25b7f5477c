"""The story of a prune: open → discover → calibrate → score → select → compensate → cut → save.

Settings become one frozen job (`pruning.job`), which says what is done; one `Execution` says how it runs: where weights
come from, what is kept in memory, which processes share the work, and where results of finished steps are kept.
Whatever can be refused is refused before weights are read. To read the code, begin with `prune_model`.
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
    structure, expected = _settle(job, source, opener, run, ranks, saves=True, in_memory=output is None)
    if output is None:
        model = opener.weights(structure, streamed=expected.streamed)
        return prune_model(model, job, Execution(model.weights, ranks, None, opener.progress), expected)
    if ranks.first and not opener.has_tokenizer(structure):
        _LOG.warning(f"model '{structure.ref}' has no tokenizer, so the pruned model can't read text either")
    opener.say_widened(structure)
    journal = None
    if not isinstance(structure, Model):  # of a model in memory, it is not known what it was read from
        folder = output.with_name(output.name + ".pruning")
        journal = Journal(folder, identity(what, job, structure, opener), ranks)
    progress = QUIET if shared else opener.progress
    with nullcontext() if journal is None else journal.running(progress, anew=run.restart):
        scratch = None if journal is None else journal.folder
        written = 0 if scratch is None else sum(file.stat().st_size for file in scratch.rglob("*"))
        ranks.from_first(lambda: check_space(output, expected.disk - written, "the result and its way there"))
        # The bytes of the result depend on it, so a run that goes on reads weights as it did, whatever memory is free.
        streamed = recalled(journal, f"streamed-{run.max_memory}", lambda: expected.streamed)
        model = opener.weights(structure, streamed=streamed, scratch=scratch)
        execution = Execution(model.weights, ranks, journal, opener.progress, shared=shared or journal)
        pruned = prune_model(model, job, execution, replace(expected, streamed=streamed))
        opener.progress.status("saving")
        with execution.stages.stage("saving"):
            form = ranks.from_first(lambda: save(pruned, output))
        if ranks.first:
            write_run(output, execution.stages, "prune", structure.ref, {**options, **opener.load.given()})
    return model.become(reopened(replace(pruned, form=form), output, trust_remote_code=opener.load.trust_remote_code))


def prune_model(model: Model, job: Job, execution: Execution | None = None, expected: Forecast | None = None) -> Model:
    """The pruned model: ``model`` changed in place. Where an exception ends this after weights were changed, it is
    ``unfinished``. The plan is the last of the result's ``plans``."""
    execution = execution or Execution(model.weights)
    text = calibrate(model, job, execution)
    made = select(model, job, text, execution)
    made.check(model.graph)
    outcome = outcome_of(model, made, job.budget, text)
    dense = dense_predictions(model, made, job, text, execution)
    with model.changing("prune"):
        fits = compensate(model, made, job, text, execution)
        with execution.stages.stage("cut"):
            pruned = cut_model(model, made)
        ahead = None if expected is None else asdict(expected)
        outcome = replace(outcome, forecast=ahead, quality=compared(dense, pruned, execution))
        work: dict[str, Any] = {"fits": [asdict(fit) for fit in fits]}
        work |= {name: asdict(value) for name in ("tokens", "quality") if (value := getattr(outcome, name)) is not None}
        return model.become(replace(pruned, work=(*model.work, work), outcome=outcome))


def calibrate(model: Model, job: Job, execution: Execution) -> CalibrationSet | None:
    """The calibration text of a job, read, written by the model, or as an interrupted run left it; None where no
    component reads text."""
    text = job.calibration
    if text is None:
        return None
    with execution.stages.stage("calibration text"), model.weights.outside():
        return text.sample("calibration", model, execution, text.samples, job.seed)


def select(model: Model, job: Job, text: CalibrationSet | None, execution: Execution) -> PruningPlan:
    """Score the units and decide which stay, unless a plan that is replayed, or an interrupted run, did."""
    if isinstance(job, ReplayJob):
        job.check_text(text)
        return job.plan

    def made() -> dict[str, Any]:
        kept = choose(model, job, text, execution)
        return plan_of(model, job, kept, text).model_dump(mode="json")

    return PruningPlan.model_validate(recalled(execution.journal, "plan", made))


def compensate(
    model: Model, made: PruningPlan, job: Job, text: CalibrationSet | None, execution: Execution
) -> Sequence[Fit]:
    """Fit the weights that read removed units, in place."""
    if made.compensation is None:
        return ()
    with execution.stages.stage("compensation"), torch.no_grad():
        return job.compensation.repair(RepairTask(model.model, model.graph, made.kept, text, execution))


def plan(source: Source, settings: PruneSettings, opener: Opener, run: RunSettings) -> tuple[PruningPlan, Outcome]:
    """The plan of `prune`, and the sizes of the model before and after the cut. Raises as `llmpruner.plan`."""
    ranks = Ranks.current()
    opener = opener.of_ranks(ranks)
    job = prune_job(settings, opener.catalog)
    structure, expected = _settle(job, source, opener, run, ranks, saves=False)
    ranks.from_first(lambda: check_space(Path(gettempdir()) / "llmpruner", expected.disk, "hidden states"))
    model = opener.weights(structure, streamed=expected.streamed)
    execution = Execution(model.weights, ranks, None, opener.progress)
    text = calibrate(model, job, execution)
    made = select(model, job, text, execution)
    return made, replace(outcome_of(model, made, job.budget, text), forecast=asdict(expected))


def prune_each(
    source: str | Path | Structure, sizes: Mapping[str, PruneSettings], output: Path, opener: Opener, run: RunSettings
) -> list[Structure]:
    """`prune` with each of several settings that differ in the ratio alone, into the folder of ``output`` that is their
    key. Text and scores are made once. A run that goes on keeps the folders that are finished."""
    ranks = Ranks.current()
    opener = opener.of_ranks(ranks)
    folder = output.with_name(output.name + ".pruning")
    if run.restart or not ranks.from_first(folder.is_dir):
        ranks.from_first(lambda: check_new_directory(output))
    jobs = [job_of(each, opener.catalog) for each in sizes.values()]
    structure = opener.structure(source)
    for job in jobs:
        check_job(job, structure, opener)
    first = next(iter(sizes.values()))
    journal = Journal(folder, {**identity(first, jobs[0], structure, opener), "sizes": list(sizes)}, ranks)
    with journal.running(opener.progress, anew=run.restart):
        if ranks.from_first(lambda: not journal.kept):
            ranks.from_first(lambda: check_new_directory(output))
            journal.store("sizes", list(sizes))  # by which finished folders are known as those of this run
        ranks.from_first(lambda: output.mkdir(exist_ok=True))
        try:
            for name, each in sizes.items():
                if ranks.from_first((output / name).exists):
                    opener.progress.status(f"{output / name} is finished")
                    continue
                opener.progress.status(f"ratio {name}")
                prune(structure, each, output / name, opener, run, each.given(), journal)
        finally:
            if ranks.first:
                with suppress(OSError):  # something is in it
                    output.rmdir()
    return [opener.structure(output / name) for name in sizes if (output / name).is_dir()]


def _settle(
    job: Job, source: Source, opener: Opener, run: RunSettings, ranks: Ranks, *, saves: bool, in_memory: bool = False
) -> tuple[Structure, Forecast]:
    """The structure of the model, against which the job is checked; and the forecast of the run, which is shown and
    decides whether weights are read layer by layer."""
    structure = opener.structure(source)
    check_job(job, structure, opener)
    expected = ranks.from_first(
        lambda: forecast(job, structure, opener, run.max_memory, saves=saves, in_memory=in_memory)
    )
    opener.progress.status(str(expected))
    return structure, expected
