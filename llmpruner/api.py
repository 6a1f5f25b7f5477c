"""The Python API, which the command line calls too.

Every function takes settings as keywords; they are those of the command of the same name, with the same defaults,
bounds and checks (`llmpruner.settings`). A model is given as a reference (a directory, a hub id, a ``.gguf`` file,
``demo``), as the `Structure` that `discover` returned, or as the `Model` that `load` returned. Whatever can be refused
is refused before weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from typing_extensions import Unpack

from . import __version__
from .benching.results import BenchResult
from .benching.run import bench as _bench
from .chatting.chat import Chat
from .checkpoints.adapters import save_adapter
from .checkpoints.record import REPORT_FILE
from .data.conversations import Example
from .engine.boundaries import DEFAULT_LIMIT
from .engine.journal import Journal
from .engine.launch import launched
from .engine.ranks import Ranks
from .engine.weights import Weights
from .errors import DataError, LlmprunerError, ModelError, OutputError, PlanError, ProcessError, SettingsError
from .evaluation.base import MetricSubject
from .evaluation.run import Candidate
from .evaluation.run import evaluate as _evaluate
from .evaluation.store import ResultStore, default_folder
from .evaluation.table import Evaluations
from .exporters.run import export as _export
from .families.auto import AUTO
from .families.chat import Prompt, chat_prompt, has_chat_template
from .files import check_new_directory, check_new_file, check_space, remove_tree, tree_bytes, write_text
from .keywords import (
    BenchKeywords,
    ChatKeywords,
    EvaluateKeywords,
    ExportKeywords,
    GenerateKeywords,
    LoadKeywords,
    PruneKeywords,
    PushKeywords,
    RecoverKeywords,
    SensitivityKeywords,
)
from .loading.dense import dense_structure, load_dense, open_dense, placed_as
from .loading.model import (
    Model,
    Structure,
    brings_tokenizer,
    dtype_of,
    file_bytes,
    load_model,
    load_structure,
    load_tokenizer,
    open_streamed,
    reopened,
)
from .models.devices import check_device
from .models.generation import generate as _generate
from .models.quiet import quiet_transformers
from .oracle.verify import Verdict
from .oracle.verify import verify as _verify
from .plugins.catalog import Catalog
from .plugins.host import plugin_manager
from .progress import QUIET, Progress
from .publishing.push import Upload, send
from .recipes import pipeline
from .recipes.benches import bench_subject, check_bench
from .recipes.checks import check_prune, check_recover, check_replay
from .recipes.evidence import ResultsFile, find, subject_of
from .recipes.forecast import SLOW_WRITING, Residency, duration
from .recipes.inputs import evaluated_fingerprint
from .recipes.jobs import (
    PruneJob,
    RecoverJob,
    bench_job,
    chat_job,
    evaluate_job,
    export_job,
    generate_job,
    page_job,
    prune_job,
    push_job,
    recover_job,
    sensitivity_job,
)
from .recipes.outcome import outcome_of
from .recipes.passages import read_passages
from .recipes.publish import prepare_upload
from .recipes.recipe import Recipe
from .recipes.recovery_memory import arranged_layers, refuse_without_layers
from .recipes.residency import arranged, is_streamed
from .recipes.results import PlannedStep, RecipeResult, StepResult
from .recipes.run import Actions, Session
from .recipes.sensitivity import measure_curve, planned_cuts
from .recipes.stages import Stages, write_run
from .recipes.state import Hashes
from .recipes.verification import Verification, verification
from .recipes.work import Work, work_of, work_of_plan
from .recovery.base import LayerWalk
from .recovery.dense_text import WRITTEN_FILE, DenseText, WrittenRows, dense_text_in
from .recovery.examples import load_examples
from .recovery.processes import check_processes
from .recovery.run import RecoveryResult, check_work_dir, prepare
from .recovery.run import recover as _recover
from .report.base import ReportSubject
from .report.curve import loss_curve
from .report.page import Report, comparison_page, facts_of, report_page
from .report.sensitivity import sensitivity_plot
from .selection.curve import Curve
from .settings import (
    BenchSettings,
    CacheSettings,
    ChatSettings,
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    LoadSettings,
    PageSettings,
    PruneSettings,
    PushSettings,
    RecoverSettings,
    RunSettings,
    SensitivitySettings,
    settings_from,
)
from .structure.outcome import Outcome
from .structure.plan import PruningPlan, original_layers, structure_of

Source = str | Path | Structure
"""A reference to a model, its structure (`discover`), or the model with its weights (`load`)."""


def load(
    model: str | Path,
    *,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **options: Unpack[LoadKeywords],
) -> Model:
    """A model with its weights, in evaluation mode. ``catalog``: of plugins; by default all installed ones.

    Raises `ModelError` when there is no such model, or its checkpoint is damaged.
    """
    settings = settings_from(LoadSettings, options)
    catalog = catalog or Catalog(plugin_manager())
    return _with_weights(_opened(model, settings, catalog, progress), catalog, settings, progress)


def discover(
    model: Source,
    *,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **options: Unpack[LoadKeywords],
) -> Structure:
    """The structure of a model: its family, and in ``graph`` its coupled groups. Reads no weights."""
    settings = settings_from(LoadSettings, options)
    return _opened(model, settings, catalog or Catalog(plugin_manager()), progress)


def plan(
    model: Source,
    *,
    load: LoadSettings | None = None,
    run: RunSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[PruneKeywords],
) -> PruningPlan:
    """Select what to remove, without changing the model: ``plan(model, ratio=0.2, method="best")``.

    Raises `SettingsError` for settings that are wrong or have no effect, `SelectionError` for an amount that cannot be
    reached.
    """
    made, _ = plan_with_outcome(model, load=load, run=run, progress=progress, catalog=catalog, **settings)
    return made


def plan_with_outcome(
    model: Source,
    *,
    load: LoadSettings | None = None,
    run: RunSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[PruneKeywords],
) -> tuple[PruningPlan, Outcome]:
    """`plan`, and the sizes of the model before and after the cut."""
    catalog, ranks = catalog or Catalog(plugin_manager()), Ranks.current()
    progress = progress if ranks.first else QUIET
    job = prune_job(settings_from(PruneSettings, settings), catalog)
    if run is not None and run.restart:
        raise SettingsError(
            "--restart has no effect on a plan, which keeps no results of an interrupted run; leave it out"
        )
    opened = _opened(model, load, catalog, progress)
    check_prune(job, opened, tokenizer=_has_tokenizer(opened, catalog))
    way, expected = ranks.from_first(
        lambda: _arranged(opened, job, work_of(job, opened, saves=False), load, run, catalog, progress)
    )
    loaded = _with_weights(opened, catalog, load, progress, streamed=way.streamed)
    how = pipeline.Run(way.boundary_memory, divided=way.divided, ranks=ranks)
    made, cost = pipeline.make_plan(loaded, job, progress, how)
    return made, replace(outcome_of(loaded, made, cost), forecast=expected)


def prune(
    model: Source,
    *,
    plan: PruningPlan | str | Path | None = None,
    output: str | Path | None = None,
    need_tokenizer: bool = False,
    load: LoadSettings | None = None,
    run: RunSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[PruneKeywords],
) -> Model:
    """Remove the least important units of a model. A `Model` that is passed in is changed in place.

    ``plan``: a plan to replay, or its file, instead of ``settings``. ``output``: where to save the result; results of
    finished steps are kept in ``OUTPUT.pruning`` until then, so that the same call continues after an interruption.
    ``need_tokenizer``: raise `ModelError` for a model without a tokenizer. ``run``: memory, and whether to start anew;
    without an ``output`` the model is in memory. Raises as `plan` does, `PlanError` for a ``plan`` of another model,
    and `OutputError` for an ``output`` that exists or cannot be written.

    Where ``torchrun`` or ``accelerate launch`` started several processes, all must call this with the same arguments:
    they share the work, the first one writes ``output``, and each has the result. Raises `ProcessError` when one ends.
    """
    catalog, ranks = catalog or Catalog(plugin_manager()), Ranks.current()
    progress = progress if ranks.first else QUIET
    if plan is not None and settings:
        raise SettingsError(f"'{min(settings)}' has no effect beside a plan, which sets everything; leave it out")
    replayed = PruningPlan.load(Path(plan)) if isinstance(plan, (str, Path)) else plan
    job = None if replayed is not None else prune_job(settings_from(PruneSettings, settings), catalog)
    directory = None if output is None else ranks.from_first(lambda: check_new_directory(Path(output)))
    opened = _opened(model, load, catalog, progress)
    has_tokenizer = _has_tokenizer(opened, catalog)
    if need_tokenizer and not has_tokenizer:
        raise ModelError(
            f"model '{opened.ref}' brings no tokenizer, without which the pruned model can read no text; put its files "
            "(tokenizer.model, say) into the folder, or prune the weights alone with --no-tokenizer"
        )
    if run is not None and run.restart and (directory is None or isinstance(opened, Model)):
        raise SettingsError(
            "restart has no effect: only a prune of a reference with an output keeps results; leave it out"
        )
    work = _checked(opened, job, replayed, catalog, tokenizer=has_tokenizer, saves=directory is not None)
    run = run or RunSettings()
    whole = "a result in memory" if directory is None else None
    way, expected = ranks.from_first(lambda: _arranged(opened, job, work, load, run, catalog, progress, whole=whole))
    journal = None
    if directory is not None and not isinstance(opened, Model):
        what = replayed or settings_from(PruneSettings, settings)
        journal = _journal(directory, opened, what, load, run, way.divided, ranks)
    if directory is not None and expected is not None:
        written = 0 if journal is None else tree_bytes(journal.folder)
        ranks.from_first(lambda: check_space(directory, expected["disk"] - written, "the result and its way there"))
    with ExitStack() as stack:
        if journal is not None and directory is not None:
            stack.enter_context(journal.alone())
            # Another run may have ended since it was looked for.
            ranks.from_first(lambda: check_new_directory(directory))
            # The files of a result depend on how the model is held, and free memory may differ when a run is continued.
            way = replace(way, streamed=bool((journal.load("way") or {"streamed": way.streamed})["streamed"]))
        beside = None if directory is None else directory.resolve().parent
        how = pipeline.Run(way.boundary_memory, journal, way.divided, ranks)
        with how.stages.stage("loading"):
            loaded = _with_weights(opened, catalog, load, progress, streamed=way.streamed, beside=beside)
        with _resumable(journal, progress):
            if journal is not None:
                journal.store("way", {"streamed": way.streamed})
            draft = _draft(loaded, replayed, job, progress, how)
            pruned = pipeline.apply_draft(loaded, draft, catalog, progress, how)
            pruned = _with_forecast(pruned, expected)
            if directory is None:
                return pruned
            progress.status("saving")
            with how.stages.stage("saving"):
                pruned = replace(pruned, form=ranks.from_first(lambda: save(pruned, directory)))
            _write_run(directory, how.stages, "prune", opened, _given(settings, plan), ranks)
        pruned = reopened(pruned, directory, trust_remote_code=load is not None and load.trust_remote_code)
        if journal is not None:
            journal.remove()
    return pruned


@contextmanager
def _resumable(journal: Journal | None, progress: Progress) -> Iterator[None]:
    """What a run leaves when it ends early: its journal, unless it was refused. A result that cannot be written does
    not cost what was computed for it."""
    try:
        yield
    except (KeyboardInterrupt, OutputError) as error:
        if journal is not None and journal.folder.exists():
            why = "stopped" if isinstance(error, KeyboardInterrupt) else "what was computed is kept"
            progress.status(f"{why}; the same command goes on with what is done ({journal.folder}), or --restart")
        raise
    except ProcessError:
        raise
    except LlmprunerError:
        if journal is not None:
            journal.remove()
        raise


def _given(settings: PruneKeywords, plan: PruningPlan | str | Path | None) -> dict[str, Any]:
    """The settings of a prune as the user gave them; the file of a plan that is replayed is one of them."""
    replayed = {"plan": str(plan)} if isinstance(plan, (str, Path)) else {}
    return {**settings_from(PruneSettings, settings).given(), **replayed}


def _write_run(
    directory: Path, stages: Stages, command: str, source: Structure, given: Mapping[str, Any], ranks: Ranks
) -> None:
    """Write ``run.json`` into a checkpoint that the first of several processes has saved."""
    if ranks.first:
        write_run(directory, stages, command, source.ref, given)


def _checked(
    opened: Structure,
    job: PruneJob | None,
    replayed: PruningPlan | None,
    catalog: Catalog,
    *,
    tokenizer: bool,
    saves: bool,
) -> Work:
    """What is to be done, once it is sure that it can be done with this model."""
    if replayed is not None:
        check_replay(replayed, opened, catalog)
        return work_of_plan(replayed, opened.graph, catalog, saves=saves)
    assert job is not None
    check_prune(job, opened, tokenizer=tokenizer)
    return work_of(job, opened, saves=saves)


def _with_forecast(pruned: Model, expected: Mapping[str, Any] | None) -> Model:
    if pruned.outcome is None:
        return pruned
    return replace(pruned, outcome=replace(pruned.outcome, forecast=expected))


def _draft(
    model: Model, replayed: PruningPlan | None, job: PruneJob | None, progress: Progress, run: pipeline.Run
) -> pipeline.Draft:
    if replayed is not None:
        return pipeline.Draft(replayed)
    assert job is not None
    return pipeline.draft_plan(model, job, progress, run)


def _arranged(
    opened: Structure,
    job: PruneJob | None,
    work: Work,
    load: LoadSettings | None,
    run: RunSettings | None,
    catalog: Catalog,
    progress: Progress,
    *,
    whole: str | None = None,
) -> tuple[Residency, Mapping[str, Any] | None]:
    """How the model is held, and the forecast, which is shown. ``whole``: what needs the model in memory."""
    load, run = load or LoadSettings(), run or RunSettings()
    if progress is QUIET and run.max_memory is None:
        # Nobody would read a forecast, which takes a second.
        limit = DEFAULT_LIMIT if run.boundary_memory is None else run.boundary_memory
        return Residency(whole is None and is_streamed(opened, job, load, catalog), limit), None
    found = arranged(opened, job, work, load, run, catalog, whole=whole)
    progress.status(str(found))
    writing = found.stage("writing")
    if writing is not None and writing.seconds is not None and writing.seconds > SLOW_WRITING:
        progress.status(
            f"writing the calibration text takes about {duration(writing.seconds)}; --calibration FILE avoids it"
        )
    return found.residency, found.as_json()


def _journal(
    output: Path,
    opened: Structure,
    what: PruningPlan | PruneSettings | SensitivitySettings,
    load: LoadSettings | None,
    run: RunSettings,
    divided: int,
    ranks: Ranks,
    ending: str = ".pruning",
) -> Journal:
    """The journal of a prune, or of a curve. Its run is identified by all that the result, and the shapes of hidden
    states, depend on. ``divided``: see `Residency`."""
    folder = output.with_name(output.name + ending)
    if run.restart and ranks.first:
        remove_tree(folder)
    return Journal(
        folder,
        {
            "model": opened.path or opened.ref,
            "files": file_bytes(opened),
            "prune": what.model_dump(mode="json"),
            "load": (load or LoadSettings()).model_dump(mode="json"),
            "micro-batches divided by": divided,
            "versions": [__version__, torch.__version__, transformers.__version__],
        },
        ranks,
    )


def recover(
    model: Source,
    *,
    output: str | Path | None = None,
    work_dir: str | Path | None = None,
    load: LoadSettings | None = None,
    run: RunSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[RecoverKeywords],
) -> Model:
    """Restore quality by a short training on instruction data. A `Model` that is passed in is changed in place.

    ``output``: where to save the result. ``work_dir``: directory for the state of the training, from which the same
    call resumes after an interruption; by default ``OUTPUT.recovery``, which is removed once the result is saved. The
    losses are also drawn, in ``loss.svg`` of ``output``. ``run``: memory, for strategies that train layer by layer, and
    whether to start anew; without an ``output`` models are in memory. ``record["recovery"]`` of the result lists the
    trainings.

    Where ``torchrun`` or ``accelerate launch`` started several processes, all must call this with the same arguments:
    they share every batch, the first one writes ``output``, and each has the result. ``work_dir`` must be one folder
    for all of them.

    Raises `DataError` for data that cannot be used, `ModelError` where the dense model is needed and not found, and
    `OutputError` for directories that cannot be used, before weights are read.
    """
    catalog, run = catalog or Catalog(plugin_manager()), run or RunSettings()
    job = recover_job(settings_from(RecoverSettings, settings), catalog)
    refuse_without_layers(job, run)
    own = dense_text_in(job.settings.data)
    _check_alone(job, own)
    ranks = Ranks.current()
    progress = progress if ranks.first else QUIET
    check_processes(job.settings, load or LoadSettings())
    directory = None if output is None else ranks.from_first(lambda: check_new_directory(Path(output)))
    folder = _work_dir(directory, work_dir)
    ranks.from_first(lambda: check_work_dir(folder))
    check_recover(job)
    opened = _opened(model, load, catalog, progress)
    if not _has_tokenizer(opened, catalog):
        raise DataError(f"model '{opened.ref}' brings no tokenizer, so it cannot be trained on text")
    tokenizer = opened.tokenizer if isinstance(opened, Model) else load_tokenizer(opened, catalog, load)
    data = None if own is not None else prepare(job.settings, opened.family, tokenizer)
    trusted = load is not None and load.trust_remote_code
    job.strategy.check(opened.graph, {cut.kind for plan in opened.plans for cut in plan.cuts.values()})
    needs_dense = job.strategy.needs_dense or own is not None
    dense = dense_structure(opened, catalog, trust_remote_code=trusted) if needs_dense else None
    way = _arranged_layers(job, opened, dense, load, run, catalog, progress, saves=directory is not None)
    if directory is not None and job.settings.merge:
        size = opened.graph.total_parameters * dtype_of(opened, catalog, load or LoadSettings()).itemsize
        ranks.from_first(lambda: check_space(directory, size, "the result alone"))
    if run.restart:
        ranks.from_first(lambda: remove_tree(folder))
    beside = folder.resolve().parent
    stages = Stages()
    written = None
    if own is not None and dense is not None:
        placed = placed_as(opened, trusted) if isinstance(opened, Model) else load or LoadSettings()
        open_model = partial(open_dense, opened, catalog, placed, streamed=way.streamed, beside=beside)
        write = partial(_dense_rows, own, open_model, dense, placed, folder, job.settings.seed, progress)
        written = {own.source: stages.timed("writing examples", write)}
    loaded = stages.timed(
        "loading",
        lambda: _with_weights(opened, catalog, load, progress, streamed=way.streamed, beside=beside, ahead=False),
    )
    if written is not None:
        examples = load_examples(
            job.settings.data, opened.family, tokenizer, limit=job.settings.limit, seed=job.settings.seed,
            written=written,
        )  # fmt: skip
        data = prepare(job.settings, opened.family, tokenizer, examples)
    with progress.counter("Recovering") as step, stages.stage("training"):
        result = _recover(
            loaded.model, loaded.tokenizer, loaded.graph, loaded.family, job.strategy, job.settings, folder, data=data,
            load_teacher=partial(load_dense, loaded, catalog, trust_remote_code=trusted),
            layers=original_layers(loaded.plans), on_step=step, walk=_layer_walk(loaded, way, catalog, trusted, beside),
            on_validation=lambda done: progress.status(str(done)),
        )  # fmt: skip
    for note in result.notes:
        progress.status(note)
    recovered = _recovered(loaded, result)
    if directory is None:
        return recovered
    form = stages.timed(
        "saving", lambda: ranks.from_first(lambda: _save_recovered(recovered, result, directory, folder))
    )
    _write_run(directory, stages, "recover", opened, job.settings.given(), ranks)
    recovered = reopened(replace(recovered, form=form), directory, trust_remote_code=trusted)
    if work_dir is None and ranks.first:
        remove_tree(folder)
    return recovered


def _check_alone(job: RecoverJob, own: DenseText | None) -> None:
    """Raise `SettingsError` in several processes for what runs in one. ``own``: data that the dense model writes."""
    if launched() and (job.strategy.by_layer or own is not None):
        what = job.strategy.label() if job.strategy.by_layer else f"--data {job.settings.data}"
        raise SettingsError(f"{what} runs in one process; start it without torchrun or accelerate launch")


def _save_recovered(recovered: Model, result: RecoveryResult, directory: Path, folder: Path) -> str:
    """Write the model, with a picture of its losses that is drawn in ``folder``; returns its form."""
    files = []
    # The losses of one layer after the other are no curve.
    if result.losses and not result.strategy.by_layer:
        files.append(folder / "loss.svg")
        write_text(files[0], loss_curve(result.record()))
    return _save(recovered, directory, extra_files=files)


def _arranged_layers(
    job: RecoverJob,
    opened: Structure,
    dense: Structure | None,
    load: LoadSettings | None,
    run: RunSettings,
    catalog: Catalog,
    progress: Progress,
    *,
    saves: bool,
) -> Residency:
    """How the models of a recovery are held."""
    if isinstance(opened, Model) and opened.streamed is not None:
        if not job.strategy.by_layer or not saves:
            raise ModelError(
                f"'{opened.ref}' is read layer by layer; pass its folder, or use strategy local with an output"
            )
        if run.max_memory is not None:
            raise SettingsError("max_memory has no effect on a model that is opened already; leave it out")
        return Residency(True, DEFAULT_LIMIT if run.boundary_memory is None else run.boundary_memory)
    if not job.strategy.by_layer or dense is None:
        return Residency()
    found = arranged_layers(
        job, opened, dense, load or LoadSettings(), run, catalog,
        whole=None if saves else "a result in memory", shown=progress is not QUIET,
    )  # fmt: skip
    if isinstance(found, Residency):
        return found
    progress.status(str(found))
    return found.residency


def _dense_rows(
    own: DenseText,
    open_model: Callable[[], Model],
    dense: Structure,
    load: LoadSettings,
    folder: Path,
    seed: int,
    progress: Progress,
) -> list[Example]:
    """The examples that the dense model writes, of which those of an interrupted run are in ``folder``."""
    identity = own.identity(f"{dense.path or dense.ref} {structure_of(dense.graph)} {load.dtype}", seed)
    rows = WrittenRows(folder / WRITTEN_FILE, identity)
    if not rows.whole:
        model = open_model()
        if model.tokenizer is None:
            raise DataError(f"the dense model '{model.ref}' brings no tokenizer, so it cannot write examples")
        if not has_chat_template(model.family, model.tokenizer):
            progress.status(f"'{model.ref}' has no chat template: instructions are in the format of its family")
        if model.streamed is not None:
            progress.status(f"'{model.ref}' is read from its files for every token; a file of examples is faster")
        rows.write(own, model.model, model.tokenizer, model.family, seed, progress)
    return rows.examples


def _layer_walk(pruned: Model, way: Residency, catalog: Catalog, trusted: bool, beside: Path) -> LayerWalk:
    """How a strategy that trains layer by layer reads both models."""
    walk = LayerWalk(boundary_memory=way.boundary_memory)
    if pruned.streamed is None:
        return walk
    return replace(walk, pruned=pruned.streamed, open_dense=partial(_dense_weights, pruned, catalog, trusted, beside))


def _dense_weights(pruned: Model, catalog: Catalog, trust_remote_code: bool, beside: Path) -> Weights:
    """The weights of the dense model, read layer by layer."""
    placed = placed_as(pruned, trust_remote_code)
    return open_dense(pruned, catalog, placed, streamed=True, beside=beside).weights


def evaluate(
    models: Source | Sequence[Source],
    *,
    load: LoadSettings | Sequence[LoadSettings] | None = None,
    cache: CacheSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[EvaluateKeywords],
) -> Evaluations:
    """Measure models: parameters, perplexity, lm-eval tasks, speed, and metrics of plugins.

    One is in memory at a time (with ``kl``, beside the first); all are looked up before the first is loaded. ``load``:
    for all models, or one for each. Every result of a model that is given by reference is kept on disk as soon as it is
    measured (``cache``: where), but for those that depend on the machine; what was measured before is not measured
    again.
    """
    catalog = catalog or Catalog(plugin_manager())
    options = settings_from(EvaluateSettings, settings)
    job = evaluate_job(options, catalog)
    sources = [models] if isinstance(models, (str, Path, Structure)) else list(models)
    compares = "--kl" if options.kl else next((m.label() for m in job.metrics if m.needs_reference), None)
    if compares and len(sources) == 1:
        raise SettingsError(f"{compares} compares models with the first one, and only one is named; name two or more")
    loads = _for_each(load, sources)
    opened = [_opened(source, each, catalog, progress) for source, each in zip(sources, loads, strict=True)]
    for one in opened:
        if not _has_tokenizer(one, catalog):
            raise DataError(f"model '{one.ref}' brings no tokenizer, so it cannot be evaluated")

    def subject(one: Structure, load: LoadSettings | None) -> MetricSubject:
        loaded = _with_weights(one, catalog, load, progress)
        return MetricSubject(one.ref, loaded.model, loaded.tokenizer, loaded.graph, family=loaded.family)

    cache = cache or CacheSettings()
    store = ResultStore(cache.cache or default_folder(), again=cache.again)
    hashes = Hashes(store.known_files, progress)
    candidates = [
        Candidate(
            one.ref, partial(subject, one, each), evaluated_fingerprint(one, each, catalog, hashes), read_passages(one)
        )
        for one, each in zip(opened, loads, strict=True)
    ]
    store.keep_files(hashes.known)
    try:
        return _evaluate(candidates, job.metrics, progress, store)
    except KeyboardInterrupt:
        progress.status("stopped; what was measured is kept, and the same command goes on with the rest")
        raise


def sensitivity(
    model: Source,
    *,
    output: str | Path | None = None,
    restart: bool = False,
    load: LoadSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[SensitivityKeywords],
) -> Curve:
    """Measure how much cuts of each group alone change the predictions: KL divergence in nats per token, at several
    shares of its units.

    ``output``: a ``.json`` file for the curve, which ``prune --allocation curve`` reads; a plot is written beside it,
    as ``.svg``. Every point is kept in ``OUTPUT.measuring`` until then, so that the same call goes on after an
    interruption; ``restart`` removes them. Raises as `plan` does, and `OutputError` for an ``output`` that cannot be
    written.
    """
    catalog, options = catalog or Catalog(plugin_manager()), settings_from(SensitivitySettings, settings)
    job = sensitivity_job(options, catalog)
    file = None if output is None else check_new_file(Path(output))
    if file is not None and file.suffix != ".json":
        raise OutputError(f"'{file}': the curve is written as JSON, and its plot beside it; name a .json file")
    if restart and file is None:
        raise SettingsError("restart has no effect without an output, beside which points are kept; leave it out")
    opened = _opened(model, load, catalog, progress)
    check_prune(job, opened, tokenizer=_has_tokenizer(opened, catalog))
    cuts = planned_cuts(opened, job, options.shares)
    work = replace(work_of(job, opened, saves=False), trials=len(cuts))
    _arranged(opened, job, work, load, None, catalog, progress, whole="measuring cuts")
    progress.status(f"{len(cuts)} cuts to measure")
    journal = None
    if file is not None and not isinstance(opened, Model):
        journal = _journal(file, opened, options, load, RunSettings(restart=restart), 1, Ranks.current(), ".measuring")
    loaded = _with_weights(opened, catalog, load, progress)
    try:
        curve = measure_curve(loaded, job, options.shares, progress, journal)
    except KeyboardInterrupt:
        if journal is not None:
            progress.status(f"stopped; the same command goes on with what is measured ({journal.folder}), or --restart")
        raise
    if file is not None:
        write_text(file, json.dumps(curve.as_json(), indent=1, ensure_ascii=False) + "\n")
        write_text(file.with_suffix(".svg"), sensitivity_plot(curve) + "\n")
    if journal is not None:
        journal.remove()
    return curve


def bench(
    models: Source | Sequence[Source],
    *,
    load: LoadSettings | Sequence[LoadSettings] | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[BenchKeywords],
) -> BenchResult:
    """Measure how fast models process prompts and decode, each against the first, and against the speed-up that its
    sizes allow.

    All models are in memory at the same time, and run in turn. Raises `ModelError` when they do not fit, or when the
    runtime cannot run one of them, before any is loaded. ``load``: for all models, or one for each.
    """
    catalog = catalog or Catalog(plugin_manager())
    job = bench_job(settings_from(BenchSettings, settings), catalog)
    sources = [models] if isinstance(models, (str, Path, Structure)) else list(models)
    if not sources:
        raise SettingsError("nothing to measure: name at least one model")
    loads = [one or LoadSettings() for one in _for_each(load, sources)]
    for one in loads:
        check_bench(job, one)
    length = max(job.prompts) + job.new
    subjects = [
        bench_subject(source, catalog, one, partial(_opened, source, one, catalog, progress),
                      batch=max(job.batches), length=length)
        for source, one in zip(sources, loads, strict=True)
    ]  # fmt: skip
    return _bench(
        subjects, job.runtime, batches=job.batches, prompts=job.prompts, new_tokens=job.new, rounds=job.rounds,
        device=loads[0].device, progress=progress,
    )  # fmt: skip


def generate(
    model: Source,
    prompt: str,
    *,
    load: LoadSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[GenerateKeywords],
) -> str:
    """The model's continuation of ``prompt``, or its answer with ``chat=True``."""
    options = generate_job(settings_from(GenerateSettings, settings))
    catalog = catalog or Catalog(plugin_manager())
    opened = _opened(model, load, catalog, progress)
    if not _has_tokenizer(opened, catalog):
        raise DataError(f"model '{opened.ref}' brings no tokenizer, so it cannot read a prompt")
    loaded = _with_weights(opened, catalog, load, progress)
    asked = chat_prompt(loaded.family, loaded.tokenizer, prompt) if options.chat else Prompt(prompt, False)
    return _generate(
        loaded.model, loaded.tokenizer, asked.text, add_special_tokens=not asked.has_special_tokens,
        max_new_tokens=options.max_new_tokens, temperature=options.temperature,
        seed=options.seed,
    )  # fmt: skip


def chat(
    models: Source | Sequence[Source],
    *,
    load: LoadSettings | Sequence[LoadSettings] | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[ChatKeywords],
) -> list[Chat]:
    """A conversation with each model: ``for piece in chat.ask("Why?")`` gives the answer piece by piece, and the next
    question continues the conversation. All models are in memory at the same time. ``load``: for all, or one for
    each."""
    options, catalog = chat_job(settings_from(ChatSettings, settings)), catalog or Catalog(plugin_manager())
    sources = [models] if isinstance(models, (str, Path, Structure)) else list(models)
    loads = _for_each(load, sources)
    opened = [_opened(source, each, catalog, progress) for source, each in zip(sources, loads, strict=True)]
    for one in opened:
        if not _has_tokenizer(one, catalog):
            raise DataError(f"model '{one.ref}' brings no tokenizer, so it cannot read a prompt")
    loaded = [_with_weights(one, catalog, each, progress) for one, each in zip(opened, loads, strict=True)]
    return [Chat(one.ref, one.model, one.tokenizer, one.family, **dict(options)) for one in loaded]


def save(model: Model, directory: str | Path, *, notes: Mapping[str, Any] | None = None) -> str:
    """Write an ordinary Hugging Face directory, whole or not at all.

    ``notes``: JSON values for ``llmpruner.json``. Returns its form: ``stock`` (transformers alone loads it), ``shim``
    (layers differ in size; it contains a modeling file), or ``adapter`` for a model whose adapters were not merged.
    """
    return _save(model, check_new_directory(Path(directory)), notes=notes)


def _save(
    model: Model, target: Path, *, notes: Mapping[str, Any] | None = None, extra_files: Sequence[Path] = ()
) -> str:
    if hasattr(model.model, "peft_config"):
        origin = {**(notes or {}), "llmpruner": __version__, "recovery": (model.record or {}).get("recovery", [])}
        save_adapter(
            model.model, target, base=model.ref, tokenizer=model.tokenizer, extra_files=extra_files, origin=origin
        )
        return "adapter"
    return pipeline.save(model, target, notes=notes, extra_files=extra_files)


def export(
    model: str | Path,
    *,
    output: str | Path,
    load: LoadSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[ExportKeywords],
) -> str:
    """Write the checkpoint directory ``model`` in the format of the exporter ``to``; returns one line on how to load
    it."""
    catalog = catalog or Catalog(plugin_manager())
    exporter = export_job(settings_from(ExportSettings, settings), catalog)
    exporter.check()
    directory = check_new_directory(Path(output))
    if not Path(model).is_dir():
        raise ModelError(f"'{model}' is no checkpoint directory; export takes what prune, recover or save wrote")
    return _export(Path(model), exporter, directory, partial(_loaded, model, load, catalog, progress), progress)


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    model: str | Path | None = None,
    output: str | Path | None = None,
    values: Mapping[str, Any] | None = None,
    on_step: Callable[[StepResult], None] | None = None,
    load: LoadSettings | None = None,
    run: RunSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
) -> RecipeResult:
    """Do the steps of a recipe, each with its result in a folder of ``output``; those that were done before with the
    same inputs are skipped.

    ``recipe``: a file, the name of a recipe of llmpruner or of a plugin, a `Recipe`, or a mapping with the keys of a
    recipe file. ``model``, ``output``, ``values`` (see `Recipe.with_values`) and ``load`` replace what the recipe has.
    ``on_step``: called after each step, skipped ones too. ``run``: memory, and whether to start anew. After an
    interruption, the same call goes on. Raises `SettingsError` for a recipe that is wrong, before anything is done;
    `OutputError` for an ``output`` that is of something else or in use; and what the functions of the steps raise.
    """
    catalog = catalog or Catalog(plugin_manager())
    session = Session(_recipe(recipe, values, catalog), model, output, load, run, catalog, progress)
    actions = Actions(prune=prune, recover=recover, evaluate=evaluate, bench=bench, generate=generate, export=export)
    return session.run(actions, on_step)


def dry_run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    model: str | Path | None = None,
    output: str | Path | None = None,
    values: Mapping[str, Any] | None = None,
    load: LoadSettings | None = None,
    run: RunSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
) -> list[PlannedStep]:
    """What `run` would do with the same arguments, step by step, with a forecast where one can be made. Writes nothing,
    reads no weights but for checksums, and raises what `run` raises before the first step."""
    if run is not None and run.restart:
        raise SettingsError("--restart has no effect on a dry run, which removes nothing; leave it out")
    catalog = catalog or Catalog(plugin_manager())
    return list(Session(_recipe(recipe, values, catalog), model, output, load, run, catalog, progress).plan())


def push(
    model: str | Path,
    repo: str,
    *,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[PushKeywords],
) -> Upload:
    """Send the checkpoint directory ``model`` to the repository ``repo`` of the Hugging Face Hub, with a model card
    that is written from its record.

    Nothing is sent unless ``yes`` is given; ``dry_run`` returns what would be. Folders of this machine in the record
    are left out. Raises `ModelError` for what is no checkpoint of llmpruner, and `OutputError` when the hub refuses.
    """
    job = push_job(settings_from(PushSettings, settings))
    catalog = catalog or Catalog(plugin_manager())
    upload = prepare_upload(Path(model), repo, job, partial(_opened, model, None, catalog, progress))
    if job.dry_run:
        return upload
    progress.status(f"sending {len(upload.files)} files to {repo}")
    return replace(upload, url=send(upload, public=job.public))


def verify(structure: Structure, *, seed: int = 0, progress: Progress = QUIET) -> list[Verdict]:
    """Check every kind of unit on a small random model of the same architecture: a cut must equal silencing."""
    if structure.plans:
        raise PlanError(f"'{structure.ref}' is pruned already; verify the model that it was pruned from")
    progress.status("cutting and silencing a small random model")
    with quiet_transformers():
        return _verify(structure.family, structure.config, seed=seed)


def verify_checkpoint(
    directory: str | Path,
    *,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
) -> Verification:
    """Check a checkpoint directory that `prune`, `recover`, `save` or `export` wrote: files against the hashes in its
    record, tensors against the index, shapes against the plans, values (finite), and, where the dense model is on this
    machine, kept weights and logits against it. Reads one layer at a time.

    ``base``: reference of the dense model, instead of that in the record. Damage is in the result; raises `ModelError`
    for what is no checkpoint, and for a ``base`` that cannot be opened or is another model.
    """
    load = LoadSettings(trust_remote_code=trust_remote_code)
    named = None if base is None else str(base)
    return verification(Path(directory), named, load, catalog or Catalog(plugin_manager()), progress)


def write_page(
    structure: Structure,
    path: str | Path,
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    catalog: Catalog | None = None,
) -> list[str]:
    """Write an HTML page about a model from the sections of all plugins; returns a warning for each that failed.

    ``settings``: section name → its settings.
    """
    catalog = catalog or Catalog(plugin_manager())
    sections = page_job(settings_from(PageSettings, {"settings": settings or {}}), catalog)
    subject = ReportSubject(f"{structure.ref} ({structure.family.name})", structure.graph, structure.record or {})
    page = report_page(subject, sections)
    write_text(check_new_file(Path(path)), page.html)
    return list(page.warnings)


def write_report(
    directories: str | Path | Sequence[str | Path],
    path: str | Path | None = None,
    *,
    results: Sequence[str | Path] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    catalog: Catalog | None = None,
) -> Report:
    """Write an HTML page that tells what was won and lost by pruning: ``write_report("pruned")``.

    ``directories``: checkpoints, or outputs of recipes, of which each counts as its last checkpoint. Several are
    compared. ``path``: of the page; by default ``report.html``, in the directory or, for several, where the process
    works. ``results``: files that ``evaluate --json`` and ``bench --json`` wrote; those of a recipe are found without.
    ``settings``: section name → its settings. Reads no weights.

    Raises `ModelError` for other directories, `DataError` for other files, and `OutputError` for a ``path`` that cannot
    be written.
    """
    catalog = catalog or Catalog(plugin_manager())
    places = [Path(one) for one in ([directories] if isinstance(directories, (str, Path)) else directories)]
    if not places:
        raise SettingsError("nothing to report on: name at least one checkpoint")
    default = places[0] / REPORT_FILE if len(places) == 1 else Path(REPORT_FILE)
    sections = page_job(settings_from(PageSettings, {"settings": settings or {}}), catalog)
    for place in places:
        find(place)
    target = check_new_file(default if path is None else Path(path))
    files = [ResultsFile.read(Path(one)) for one in results]
    subjects = [subject_of(place, files, catalog) for place in places]
    page = report_page(subjects[0], sections) if len(subjects) == 1 else comparison_page(subjects, sections)
    write_text(target, page.html)
    return Report(target, tuple(facts_of(one) for one in subjects), page.warnings)


def _recipe(
    recipe: Recipe | Mapping[str, Any] | str | Path, values: Mapping[str, Any] | None, catalog: Catalog
) -> Recipe:
    if isinstance(recipe, (str, Path)):
        recipe = Recipe.read(recipe, catalog)
    elif isinstance(recipe, Mapping):
        recipe = Recipe.of(recipe)
    return recipe.with_values(values) if values else recipe


def _for_each(
    load: LoadSettings | Sequence[LoadSettings] | None, sources: Sequence[Source]
) -> Sequence[LoadSettings | None]:
    """The settings with which each source is opened. Raises `SettingsError` for another number of them."""
    if load is None or isinstance(load, LoadSettings):
        return [load] * len(sources)
    if len(load) != len(sources):
        raise SettingsError(f"load has {len(load)} settings for {len(sources)} models; give one, or one for each")
    return load


def _opened(model: Source, load: LoadSettings | None, catalog: Catalog, progress: Progress) -> Structure:
    """The structure of a reference; a structure as it is."""
    if isinstance(model, Structure):
        return model
    structure = load_structure(str(model), catalog, load)
    if structure.family.name == AUTO and (load is None or load.family is None) and not structure.plans:
        progress.status(f"no plugin knows model type '{structure.config.model_type}': its structure is discovered")
    return structure


def _with_weights(
    opened: Structure,
    catalog: Catalog,
    load: LoadSettings | None,
    progress: Progress,
    *,
    streamed: bool = False,
    beside: Path | None = None,
    ahead: bool = True,
) -> Model:
    if isinstance(opened, Model):
        return opened
    load = load or LoadSettings()
    check_device(load.device)
    if streamed:
        progress.status(f"{opened.ref} is read layer by layer")
        return open_streamed(opened.ref, catalog, load, opened, beside, ahead=ahead)
    progress.status(f"loading {opened.ref}")
    return load_model(opened.ref, catalog, load, opened)


def _loaded(model: Source, load: LoadSettings | None, catalog: Catalog, progress: Progress) -> Model:
    return _with_weights(_opened(model, load, catalog, progress), catalog, load, progress)


def _has_tokenizer(opened: Structure, catalog: Catalog) -> bool:
    return opened.tokenizer is not None if isinstance(opened, Model) else brings_tokenizer(opened.ref, catalog)


def _recovered(model: Model, result: RecoveryResult) -> Model:
    history = [*((model.record or {}).get("recovery", [])), result.record()]
    return replace(model, model=result.model, record={**(model.record or {}), "recovery": history})


def _work_dir(output: Path | None, work_dir: str | Path | None) -> Path:
    if work_dir is not None:
        return Path(work_dir)
    if output is None:
        raise SettingsError("recovery needs a directory for its state: give output, or work_dir")
    return output.with_name(output.name + ".recovery")
