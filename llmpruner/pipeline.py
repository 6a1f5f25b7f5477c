"""The story of a prune: open → discover → calibrate → score → select → compensate → cut → save.

Settings become one frozen job (`pruning.job`), which says what is done; one `Execution` says how it runs: where weights
come from, what is kept in memory, which processes share the work, and where results of finished steps are kept.
Whatever can be refused is refused before weights are read. To read the code, begin with `prune`, then `prune_model`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

import torch
import transformers

from . import __version__
from .calibration.calibration import CalibrationSet
from .discovery.opening import Opener, Source
from .engine.execution import Execution
from .engine.journal import Journal
from .engine.ranks import Ranks
from .engine.stages import write_run
from .errors import DataError, SelectionError
from .files import check_new_directory, check_space
from .models.identity import data_identity, model_identity
from .models.model import Model, Structure
from .models.opening import reopened
from .models.surgery import cut as cut_model
from .models.weights import CutWeights
from .progress import QUIET, Progress
from .pruning.budgets.base import BudgetSubject, saving_units
from .pruning.checks import check_job, without_weights
from .pruning.choice import Choice, waiting_chooser
from .pruning.compensation.base import Fit, RepairTask, fits_record
from .pruning.compensation.choose import Chooser
from .pruning.forecast import Forecast, forecast
from .pruning.job import PruneJob, ReplayJob, job_of
from .pruning.planning import outcome_of, plan_of, recorded_cost
from .pruning.saving import save
from .pruning.targets import scope_of
from .settings import PruneSettings, RunSettings
from .structure.plan import Outcome, PruningPlan, cuts_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .pruning.budgets.base import Cost

_LOG = logging.getLogger("llmpruner")


def prune(
    source: Source,
    what: PruneSettings | PruningPlan,
    output: Path | None,
    opener: Opener,
    run: RunSettings,
    options: Mapping[str, Any],
) -> Model:
    """Prune ``source`` by settings or by a plan, and save the result to ``output`` (None: keep it in memory).
    ``options``: what the user set, for ``run.json``. Raises as `llmpruner.prune`."""
    ranks = Ranks.current()
    opener = opener.of_ranks(ranks)
    job = job_of(what, opener.catalog)
    if output is not None:
        ranks.from_first(lambda: check_new_directory(output))
    structure = opener.structure(source)
    check_job(job, structure, tokenizer=opener.has_tokenizer(structure))
    expected = _expected(job, structure, opener, run, ranks, saves=True, in_memory=output is None)
    if output is None:
        model = opener.weights(structure)
        execution = _execution(model, expected, ranks, None, opener.progress)
        return model.become(prune_model(model, job, execution, expected))
    if ranks.first and not opener.has_tokenizer(structure):
        _LOG.warning(f"model '{structure.ref}' has no tokenizer, so the pruned model can't read text either")
    opener.say_widened(structure)
    journal = _journal(output, structure, what, job, expected, opener, ranks)
    with nullcontext() if journal is None else journal.running(opener.progress, anew=run.restart):
        ranks.from_first(lambda: check_new_directory(output))  # another run may have ended since
        written = 0 if journal is None else sum(file.stat().st_size for file in journal.folder.rglob("*"))
        ranks.from_first(lambda: check_space(output, expected.disk - written, "the result and its way there"))
        if journal is not None:
            # The bytes of a result depend on it, and when a run goes on, more or less memory may be free.
            earlier = journal.load("streamed")
            expected = expected if earlier is None else replace(expected, streamed=earlier)
            journal.store("streamed", expected.streamed)
        model = opener.weights(structure, streamed=expected.streamed, beside=output.resolve().parent)
        execution = _execution(model, expected, ranks, journal, opener.progress)
        pruned = prune_model(model, job, execution, expected)
        opener.progress.status("saving")
        with execution.stages.stage("saving"):
            form = ranks.from_first(lambda: save(pruned, output))
        if ranks.first:
            write_run(output, execution.stages, "prune", structure.ref, options)
    return model.become(reopened(replace(pruned, form=form), output, trust_remote_code=opener.load.trust_remote_code))


def plan(source: Source, settings: PruneSettings, opener: Opener, run: RunSettings) -> tuple[PruningPlan, Outcome]:
    """The plan of `prune`, and the sizes of the model before and after the cut. Raises as `llmpruner.plan`."""
    ranks = Ranks.current()
    opener = opener.of_ranks(ranks)
    job = job_of(settings, opener.catalog)
    assert isinstance(job, PruneJob)
    structure = opener.structure(source)
    check_job(job, structure, tokenizer=opener.has_tokenizer(structure))
    expected = _expected(job, structure, opener, run, ranks, saves=False)
    ranks.from_first(lambda: check_space(Path(gettempdir()) / "llmpruner", expected.disk, "hidden states"))
    model = opener.weights(structure, streamed=expected.streamed)
    execution = _execution(model, expected, ranks, None, opener.progress)
    made, cost = make_plan(model, job, execution)
    return made, replace(outcome_of(model, made, cost), forecast=expected.as_json())


def make_plan(model: Model, job: PruneJob, execution: Execution | None = None) -> tuple[PruningPlan, Cost]:
    """Calibrate, score and select; returns the plan and the cost of its budget. The model is not changed."""
    execution = execution or Execution(model.weights)
    text = calibrate(model, job, execution)
    chooser = waiting_chooser(job, model)
    made, cost, _ = select(model, job, text, chooser, execution)
    if chooser is None or text is None:
        return made, cost
    kept = chooser.choose_all(model.model, model.graph, made.kept, text, execution)
    return made.model_copy(update={"cuts": cuts_of(model.graph, execution.ranks.from_first(lambda: kept))}), cost


def prune_model(
    model: Model, job: PruneJob | ReplayJob, execution: Execution | None = None, expected: Forecast | None = None
) -> Model:
    """The pruned model: ``model`` changed in place. Where an exception ends this after weights were changed, it is
    ``unfinished``. The plan is the last of the result's ``plans``."""
    execution = execution or Execution(model.weights)
    text = calibrate(model, job, execution)
    chooser: Chooser | None = None
    spreads: Mapping[str, Any] = {}
    if isinstance(job, ReplayJob):
        made, cost = job.plan, recorded_cost(model, job.plan, job.budget)
    else:
        chooser = waiting_chooser(job, model)
        made, cost, spreads = select(model, job, text, chooser, execution)
    made.check(model.graph)
    with model.changing("prune"):
        fits: Sequence[Fit] = ()
        if made.compensation is not None:
            made, fits = compensate(model, made, job, text, chooser, execution)
        with execution.stages.stage("cut"):
            outcome = outcome_of(model, made, cost)
            if expected is not None:
                outcome = replace(outcome, forecast=expected.as_json())
            scores = {**spreads, **({} if chooser is None else chooser.scores)}
            work = {"fits": fits_record(fits), "scores": scores}
            return model.become(cut(replace(model, work=(*model.work, work), outcome=outcome), made))


def calibrate(model: Model, job: PruneJob | ReplayJob, execution: Execution) -> CalibrationSet | None:
    """The calibration text of a job, read, written by the model, or as an interrupted run left it; None where no
    component reads text. Raises `DataError` for a text that is not that of the plan that is replayed."""
    if job.calibration is None:
        return None
    journal, text, progress = execution.journal, job.calibration.text, execution.progress
    earlier = None if journal is None else journal.load("calibration")
    if earlier is not None:
        return CalibrationSet(torch.tensor(earlier["input_ids"]), earlier["source"], tuple(earlier["parts"]))
    progress.status("The model writes its calibration text" if text.writes else f"Reading {text.text}")
    sample = partial(
        text.sample, model.model, model.tokenizer,
        samples=job.calibration.samples, length=job.calibration.length_for(model.config), seed=job.seed,
        progress=progress, family=model.family,
    )  # fmt: skip
    with execution.stages.stage("calibration text"), model.weights.outside():
        calibration = execution.ranks.from_first(sample)
    if isinstance(job, PruneJob):
        for warning in calibration.warnings() if execution.ranks.first else ():
            _LOG.warning(warning)
    # Generated text depends on rounding, so that it may differ on another machine.
    elif not text.writes and job.plan.compensation and calibration.fingerprint != job.plan.compensation.fingerprint:
        raise DataError(f"'{text.text}' is not the text that this plan was made with; make a new plan")
    if journal is not None:
        ids = calibration.input_ids.tolist()
        journal.store("calibration", {"input_ids": ids, "source": calibration.source, "parts": calibration.parts})
    return calibration


def select(
    model: Model, job: PruneJob, text: CalibrationSet | None, chooser: Chooser | None, execution: Execution
) -> tuple[PruningPlan, Cost, Mapping[str, Any]]:
    """Score the units and decide which stay: the plan, the cost of its budget, and how the scores are distributed. With
    a ``chooser``, only the numbers of units are final."""
    journal = execution.journal
    earlier = None if journal is None else journal.load("plan")
    if journal is not None and earlier is not None:
        made = PruningPlan.model_validate(earlier)
        return made, recorded_cost(model, made, job.budget), journal.load("scores") or {}
    scope = scope_of(job, model)
    groups = scope.groups(model.graph)
    with execution.stages.stage("budget"):
        cost = job.budget.cost(BudgetSubject(model.model, model.graph, groups, model.family, execution.progress))
        # Refuses groups whose units save nothing, before text is read.
        saving_units(cost, groups, {group.name: scope.allowed_units(group) for group in groups})
    choice = Choice(model, job, cost, text, execution)
    kept = choice.units(ranked=chooser is None)
    if not kept:
        raise SelectionError("the amount asked for is less than one unit of the selected groups; ask for more")
    made = plan_of(model, job, kept, text)
    if journal is not None:
        journal.store("scores", choice.spreads)
        journal.store("plan", made.model_dump(mode="json"))
    return made, cost, choice.spreads


def compensate(
    model: Model,
    made: PruningPlan,
    job: PruneJob | ReplayJob,
    text: CalibrationSet | None,
    chooser: Chooser | None,
    execution: Execution,
) -> tuple[PruningPlan, Sequence[Fit]]:
    """Fit the weights that read removed units, in place; the plan with the units that ``chooser`` chose."""
    task = RepairTask(model.model, model.graph, made.kept, text, chooser, execution)
    with execution.stages.stage("compensation"), torch.no_grad():
        repaired = job.compensation.repair(task)
    return made.model_copy(update={"cuts": cuts_of(model.graph, repaired.kept)}), repaired.fits


def cut(model: Model, made: PruningPlan) -> Model:
    """The model without the units that the plan removes: cut in place in memory, or when its weights are read."""
    plans = (*model.plans, made)
    if model.streamed is None:
        graph = cut_model(model.model, model.graph, made.kept, model.family)
        return replace(model, graph=graph, plans=plans)
    network = without_weights(model, model.model.dtype)
    network.generation_config = model.model.generation_config
    network.config.name_or_path = model.model.config.name_or_path
    graph = cut_model(network, model.graph, made.kept, model.family)
    weights = CutWeights(network, model.streamed, model.graph, made.kept)
    return replace(model, model=network, graph=graph, plans=plans, streamed=weights)


def _expected(
    job: PruneJob | ReplayJob,
    structure: Structure,
    opener: Opener,
    run: RunSettings,
    ranks: Ranks,
    *,
    saves: bool,
    in_memory: bool = False,
) -> Forecast:
    """The forecast of the run, which is shown: it decides whether weights are read layer by layer."""
    expected = ranks.from_first(
        lambda: forecast(
            job, structure, opener.load, opener.catalog, run.max_memory,
            saves=saves, in_memory=in_memory, timed=opener.progress is not QUIET,
        )
    )  # fmt: skip
    opener.progress.status(str(expected))
    return expected


def _execution(
    model: Model, expected: Forecast, ranks: Ranks, journal: Journal | None, progress: Progress
) -> Execution:
    return Execution(model.weights, expected.state_memory, ranks, journal, progress)


def _journal(
    output: Path,
    structure: Structure,
    what: PruneSettings | PruningPlan,
    job: PruneJob | ReplayJob,
    expected: Forecast,
    opener: Opener,
    ranks: Ranks,
) -> Journal | None:
    """The journal of a run in ``OUTPUT.pruning``. None for a model in memory, of which it is not known what it was read
    from. A run is the same if all is that its result, and the shapes of hidden states, depend on."""
    if isinstance(structure, Model):
        return None
    named = what.compensation and what.compensation.calibration if isinstance(what, PruningPlan) else what.model_dump()
    identity = {
        "model": structure.path or structure.ref,
        "files": model_identity(structure, opener.catalog),
        "data": data_identity(named, job),
        "prune": what.model_dump(mode="json"),
        "load": opener.load.model_dump(mode="json"),
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    return Journal(output.with_name(output.name + ".pruning"), identity, ranks)
