"""The Python API, which the command line calls too.

Every function takes settings as keywords; they are those of the command of the same name, with the same defaults,
bounds and checks (`llmpruner.settings`). A model is given as a reference (a directory, a hub id, a ``.gguf`` file,
``demo``), as the `Structure` that `discover` returned, or as the `Model` that `load` returned. Whatever can be refused
is refused before weights are read.

Every function raises `SettingsError` for settings that are unknown, out of bounds, or without effect beside the others,
`UnknownNameError` for a component that no plugin has, `MissingExtraError` for a library that is not installed,
`ModelError` for a model that cannot be found or read, and `CheckpointError` for a pruned checkpoint that is damaged.
Docstrings name what else is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from typing_extensions import Unpack

from .calibration.chat import Prompt, chat_prompt, conversation_prompt, format_note
from .discovery.verify import Verdict
from .discovery.verify import verify as _verify
from .errors import ModelError, PlanError, SettingsError
from .evaluation.base import ComparedModel
from .evaluation.bench import BenchResult
from .evaluation.bench import bench as _bench
from .evaluation.evaluate import Evaluations
from .evaluation.evaluate import evaluate as _evaluate
from .evaluation.runtime import BenchSubject
from .exporters.run import export as _export
from .files import HTML, check_new_directory, check_own_file, write_text
from .keywords import (
    BenchKeywords,
    EvaluateKeywords,
    ExportKeywords,
    GenerateKeywords,
    LoadKeywords,
    PruneKeywords,
    RecoverKeywords,
    SensitivityKeywords,
)
from .models.generation import check_not_empty
from .models.generation import generate as _generate
from .models.gguf import forget_gguf
from .models.messages import quiet_transformers
from .models.model import Model, Structure
from .models.numbers import check_device, dtype_of
from .models.record import REPORT_FILE
from .models.reference import resolve
from .plugins.catalog import Catalog
from .progress import QUIET, Progress
from .pruning.allocation.curve import Curve
from .recipes.evidence import ResultsFile, find, subjects_of
from .recipes.jobs import (
    bench_job,
    evaluate_job,
    export_job,
    page_job,
)
from .recipes.opening import Opener, Source, listed, openers
from .recipes.pruning import Pruning
from .recipes.pruning import make_plan as _make_plan
from .recipes.recipe import Recipe
from .recipes.recovering import Recovery
from .recipes.results import PlannedStep, RecipeResult, StepResult
from .recipes.run import Actions, Session
from .recipes.saving import save as _save
from .recipes.sensitivity import sensitivity_of
from .recipes.verification import Verification, verification
from .report.base import ReportSubject
from .report.page import Report, comparison_page, facts_of, report_page
from .settings import (
    BenchSettings,
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    LoadSettings,
    PageSettings,
    PruneSettings,
    RecoverSettings,
    RunSettings,
    SensitivitySettings,
    settings_from,
)
from .structure.outcome import Outcome
from .structure.plan import PruningPlan
from .validation import check_type, path_from


def load(
    model: str | Path,
    *,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **options: Unpack[LoadKeywords],
) -> Model:
    """A model with its weights, in evaluation mode. ``catalog``: of plugins; by default all installed ones.

    Raises `ModelError` when there is no such model, it has code of its own that is not trusted, or a tensor is missing
    or misshapen; `CheckpointError` when files of a pruned checkpoint differ from its record; `UnsupportedModelError`
    when its structure cannot be found.
    """
    return _opener(settings_from(LoadSettings, options), catalog, progress).model(model)


def discover(
    model: Source,
    *,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **options: Unpack[LoadKeywords],
) -> Structure:
    """The structure of a model: its family, and in ``graph`` its coupled groups. Reads no weights.

    Raises `ModelError` when there is no such model, `UnsupportedModelError` when it cannot be traced, and
    `CouplingError` when the groups that its family declares contradict its parameters.
    """
    try:
        return _opener(settings_from(LoadSettings, options), catalog, progress).structure(model)
    finally:
        forget_gguf()  # kept for loading the weights, which need not follow


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
    reached and for units that the criterion does not score, `UnknownNameError` for kinds that the model does not have,
    `DataError` for calibration text that cannot be used, `UnsupportedModelError` for a criterion, a budget or a
    compensation that does not work for this architecture, and `ModelError` when weights or scores are not finite.
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
    options = settings_from(PruneSettings, settings)
    return _make_plan(model, options, _opener(load, catalog, progress), _limits(run))


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
    """Remove the least important units of a model. A `Model` that is passed in is changed in place, and
    returned; where an exception ends this halfway, later uses of it are refused.

    ``plan``: a plan to replay, or its file, instead of ``settings``. ``output``: where to save the result; results of
    finished steps are kept in ``OUTPUT.pruning`` until then, so that the same call continues after an interruption.
    ``need_tokenizer``: raise `ModelError` for a model without a tokenizer. ``run``: limits of memory, and whether to
    start anew; without an ``output`` the whole model is in memory. Raises as `plan` does, `PlanError` for a ``plan`` of
    another model, and `OutputError` for an ``output`` that exists or cannot be written.

    Where ``torchrun`` or ``accelerate launch`` started several processes, all must call this with the same arguments:
    they share the work, the first one writes ``output``, and each has the result. Raises `ProcessError` when one ends.
    """
    if plan is not None and settings:
        raise SettingsError(f"'{min(settings)}' has no effect beside a plan, which sets everything; leave it out")
    what: PruneSettings | PruningPlan
    if plan is None:
        what = settings_from(PruneSettings, settings)
        given = what.given()
    else:
        what = plan if isinstance(plan, PruningPlan) else PruningPlan.load(path_from("plan", plan, "a plan or a file"))
        given = {} if isinstance(plan, PruningPlan) else {"plan": str(plan)}
    pruning = Pruning(model, what, given, _path("output", output), need_tokenizer, _limits(run))
    return pruning.do(_opener(load, catalog, progress))


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
    """Restore quality by a short training: by default distillation, on text that the dense model generates. A `Model`
    that is passed in is changed in place, and returned, as by `prune`.

    ``output``: where to save the result. ``work_dir``: directory for the state of the training, from which the same
    call resumes after an interruption; by default ``OUTPUT.recovery``, which is removed once the result is saved. The
    losses are also drawn, in ``loss.svg`` of ``output``. ``run``: limits of memory, for strategies that train layer by
    layer, and whether to start anew; without an ``output`` whole models are in memory. ``record["recovery"]`` of the
    result lists the trainings.

    Where ``torchrun`` or ``accelerate launch`` started several processes, all must call this with the same arguments:
    they share every batch, the first one writes ``output``, and each has the result. ``work_dir`` must be one folder
    for all of them.

    Raises `DataError` for data that cannot be used, `ModelError` where the dense model is needed and not found, and
    `OutputError` for directories that cannot be used, before weights are read.
    """
    options = settings_from(RecoverSettings, settings)
    recovery = Recovery(model, options, _path("output", output), _path("work_dir", work_dir), _limits(run))
    return recovery.do(_opener(load, catalog, progress))


def evaluate(
    models: Source | Sequence[Source],
    *,
    load: LoadSettings | Sequence[LoadSettings] | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[EvaluateKeywords],
) -> Evaluations:
    """Measure models: parameters and bytes, perplexity (KL divergence in nats per token), lm-eval tasks, speed (tokens
    per second, peak bytes), and metrics of plugins. The first model is the reference of those that compare.

    One is in memory at a time (with ``kl``, next to the first); all are looked up before the first is loaded.
    ``load``: for all models, or one for each.

    Raises `DataError` for a text, a task or prompts that cannot be read, and for a model that cannot be measured on
    them, and `ModelError` for models that cannot be compared, before the first is loaded.
    """
    catalog = catalog or Catalog()
    job = evaluate_job(settings_from(EvaluateSettings, settings), catalog)
    sources = listed(models)
    each = openers(load, sources, catalog, progress)
    opened = [opener.readable(source, "be evaluated") for opener, source in zip(each, sources, strict=True)]
    pairs = list(zip(each, opened, strict=True))
    compared = [ComparedModel(one.ref, one.config, opener.tokenizer(one), one.family) for opener, one in pairs]
    loaders = [partial(opener.weights, one) for opener, one in pairs]
    return _evaluate(compared, loaders, job.metrics, progress)


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
    as ``.svg``. Every point is kept in ``OUTPUT.measuring`` until then, so that the same call continues after an
    interruption; ``restart`` removes the points. Raises as `plan` does, and `OutputError` for an ``output`` that exists
    or cannot be written.
    """
    options = settings_from(SensitivitySettings, settings)
    return sensitivity_of(model, options, _path("output", output), _opener(load, catalog, progress), restart=restart)


def bench(
    models: Source | Sequence[Source],
    *,
    load: LoadSettings | Sequence[LoadSettings] | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[BenchKeywords],
) -> BenchResult:
    """Measure how fast models process prompts and decode, in tokens per second, each against the first, and against the
    speed-up that its sizes allow.

    All models are in memory at the same time, and run in turn. Raises `ModelError` when they do not fit, or when the
    runtime cannot run one of them, before any is loaded. ``load``: for all models, or one for each.
    """
    catalog = catalog or Catalog()
    job = bench_job(settings_from(BenchSettings, settings), catalog)
    sources = listed(models)
    each = openers(load, sources, catalog, progress)
    batch, length = max(job.batches), max(job.prompts) + job.new
    subjects = [_bench_subject(source, opener, batch, length) for source, opener in zip(sources, each, strict=True)]
    return _bench(
        subjects, job.runtime, batches=job.batches, prompts=job.prompts, new_tokens=job.new, rounds=job.rounds,
        device=each[0].load.device, progress=progress,
    )  # fmt: skip


def _bench_subject(source: Source, opener: Opener, batch: int, length: int) -> BenchSubject:
    """Opens the model only as far as the runtime asks for."""
    check_device(opener.load.device)
    find = cache(partial(opener.structure, source))
    if isinstance(source, Structure):
        ref, path = source.ref, None if source.path is None else Path(source.path)
    else:
        ref, place = str(source), resolve(str(source), opener.catalog, revision=opener.load.revision)
        path = place.directory / (place.gguf_file or "") if place.directory.exists() else None

    def find_dtype() -> torch.dtype:
        found = find()
        return found.model.dtype if isinstance(found, Model) else dtype_of(found, opener.load)

    return BenchSubject(ref, path, opener.load.device, batch, length, find, find_dtype, lambda: opener.weights(find()))


def generate(
    model: Source,
    prompt: str,
    *,
    history: Sequence[tuple[str, str]] = (),
    on_text: Callable[[str], None] | None = None,
    load: LoadSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[GenerateKeywords],
) -> str:
    """The model's continuation of ``prompt``, or its answer with ``chat=True``; the prompt is not repeated.

    ``history``: with ``chat``, the (question, answer) pairs before. ``on_text``: called with each piece of the text as
    it comes; an exception in it ends the generation.

    Raises `ModelError` for a model without a tokenizer, and `DataError` for a prompt that is empty or has more tokens
    than the model has positions.
    """
    check_type("prompt", prompt, str, "text")
    options = settings_from(GenerateSettings, settings)
    opener = _opener(load, catalog, progress)
    opened = opener.readable(model, "read a prompt")
    if not prompt and not options.chat:
        # A tokenizer that puts a token before every text makes a prompt of no text.
        check_not_empty(opener.tokenizer(opened), prompt)
    loaded = opener.weights(opened)
    asked = Prompt(prompt, False)
    if options.chat:
        talk = conversation_prompt(loaded.family, loaded.tokenizer, history, prompt) if history else None
        asked = talk or chat_prompt(loaded.family, loaded.tokenizer, prompt)
    note = format_note(loaded.ref, loaded.family, loaded.tokenizer, "the prompt is") if options.chat else None
    if note is not None:
        progress.status(note)
    return _generate(
        loaded.model, loaded.tokenizer, asked.text, add_special_tokens=not asked.has_special_tokens,
        max_new_tokens=options.max_new_tokens, temperature=options.temperature,
        seed=options.seed, stop_text=loaded.family.stop_text if options.chat else None,
        note=lambda what: progress.status(f"'{loaded.ref}' {what}"), on_text=on_text,
    )  # fmt: skip


def save(model: Model, directory: str | Path, *, notes: Mapping[str, Any] | None = None) -> str:
    """Write an ordinary Hugging Face directory, whole or not at all.

    ``notes``: JSON values for ``llmpruner.json``. Returns its form: ``stock`` (transformers alone loads it), ``shim``
    (layers differ in size; it contains a modeling file), or ``adapter`` for a model whose adapters were not merged.

    Raises `ModelError` for a model whose parameters are not those of its plans, `CheckpointError` for weights that are
    NaN or infinite, and `OutputError` for a ``directory`` that exists or cannot be written.
    """
    if not isinstance(model, Model):
        raise SettingsError(f"expected what llmpruner.load, prune or recover returned, got {type(model).__name__}")
    check_type("notes", notes, (Mapping, NoneType), "a mapping")
    return _save(model, check_new_directory(path_from("directory", directory)), notes=notes)


def export(
    model: str | Path,
    *,
    output: str | Path,
    load: LoadSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[ExportKeywords],
) -> str:
    """Write the checkpoint directory ``model`` (for ``stock``, also a .gguf file) in the format of the exporter ``to``;
    returns one line on how to load it.

    Raises `ModelError` for what is no checkpoint, `UnsupportedModelError` for a model that the format cannot represent,
    `CheckpointError` when the written model gives other outputs than ``model``, and `OutputError` for an ``output``
    that exists or cannot be written.
    """
    catalog = catalog or Catalog()
    source = path_from("model", model, "the path of a checkpoint")
    exporter = export_job(settings_from(ExportSettings, settings), catalog)
    exporter.check()
    directory = check_new_directory(path_from("output", output))
    is_file = source.suffix == ".gguf" and source.is_file()
    if is_file and not exporter.takes_files:
        raise ModelError(f"'{model}' is no checkpoint directory, and only --to stock takes a file; export it first")
    if not (is_file or source.is_dir()):
        raise ModelError(f"'{model}' is no checkpoint directory; export takes what prune, recover or save wrote")
    opener = _opener(load, catalog, progress)
    asked = None if opener.load.dtype == "auto" else opener.load.dtype
    read = partial(opener.model, model, keep_dtype=exporter.keeps_dtype)
    return _export(source, exporter, directory, read, progress, asked)


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
    ``on_step``: called after each step, skipped ones too. ``run``: limits of memory, and whether to start anew. After
    an interruption, the same call goes on. Raises `SettingsError` for a recipe that is wrong, before anything is done;
    `OutputError` for an ``output`` that is of something else or in use; and what the functions of the steps raise.
    """
    catalog = catalog or Catalog()
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
    if _limits(run).restart:
        raise SettingsError("--restart has no effect on a dry run, which removes nothing; leave it out")
    catalog = catalog or Catalog()
    return list(Session(_recipe(recipe, values, catalog), model, output, load, run, catalog, progress).plan())


def verify(structure: Structure, *, seed: int = 0, progress: Progress = QUIET) -> list[Verdict]:
    """Check every kind of unit on a small random model of the same architecture: a cut must equal silencing, that is,
    give the logits of the model in which the weights that consume the units are zero. One `Verdict` for each kind.

    Raises `PlanError` for a pruned model, and `UnsupportedModelError` when no small model can be built or traced.
    """
    check_type("structure", structure, Structure, "what llmpruner.discover returned")
    check_type("seed", seed, int, "a whole number")
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
    folder = path_from("directory", directory)
    load = LoadSettings(trust_remote_code=trust_remote_code)
    check_type("base", base, (str, Path, NoneType), "a path or a hub id")
    named = None if base is None else str(base)
    return verification(folder, named, load, catalog or Catalog(), progress)


def write_page(
    structure: Structure,
    path: str | Path,
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    catalog: Catalog | None = None,
) -> list[str]:
    """Write an HTML page about a model from the sections of all plugins; returns a warning for each that failed.

    ``settings``: section name → its settings. Raises `OutputError` for a ``path`` that cannot be written,
    or holds anything but a page.
    """
    catalog = catalog or Catalog()
    sections = page_job(settings_from(PageSettings, {"settings": settings or {}}), catalog)
    subject = ReportSubject(f"{structure.ref} ({structure.family.name})", structure.graph, structure.record or {})
    page = report_page(subject, sections)
    write_text(check_own_file(Path(path), HTML, "page in HTML"), page.html)
    return list(page.warnings)


def write_report(
    directories: str | Path | Sequence[str | Path],
    path: str | Path | None = None,
    *,
    results: Sequence[str | Path] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    catalog: Catalog | None = None,
) -> Report:
    """Write an HTML page about a pruned model: size, speed and quality beside the dense model, and what was cut.

    ``directories``: checkpoints, or outputs of recipes, each of which stands for its last checkpoint. Several are
    compared. ``path``: of the page; by default ``report.html``, in the directory or, for several, in the current
    folder. ``results``: files that ``evaluate --json`` and ``bench --json`` wrote; those of a recipe are found without.
    ``settings``: section name → its settings. Reads no weights.

    Raises `ModelError` for other directories, `DataError` for other files and those without results of them, and
    `OutputError` for a ``path`` that cannot be written, or holds anything but a page.
    """
    catalog = catalog or Catalog()
    places = _paths("directories", directories)
    if not places:
        raise SettingsError("nothing to report on: name at least one checkpoint")
    default = places[0] / REPORT_FILE if len(places) == 1 else Path(REPORT_FILE)
    sections = page_job(settings_from(PageSettings, {"settings": settings or {}}), catalog)
    for place in places:
        find(place)
    target = check_own_file(_path("path", path) or default, HTML, "page in HTML")
    files = [ResultsFile.read(one) for one in _paths("results", results)]
    subjects = subjects_of(places, files, catalog)
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
    check_type("recipe", recipe, Recipe, "a file, the name of a recipe, a Recipe or a mapping")
    check_type("values", values, (Mapping, NoneType), "a mapping")
    return recipe.with_values(values) if values else recipe


def _opener(load: LoadSettings | None, catalog: Catalog | None, progress: Progress) -> Opener:
    return Opener.of(load, catalog or Catalog(), progress)


def _limits(run: RunSettings | None) -> RunSettings:
    check_type("run", run, (RunSettings, NoneType), "RunSettings")
    return run or RunSettings()


def _path(argument: str, place: str | Path | None) -> Path | None:
    return None if place is None else path_from(argument, place)


def _paths(argument: str, places: str | Path | Sequence[str | Path]) -> list[Path]:
    """One path or several, as a list."""
    several = isinstance(places, Iterable) and not isinstance(places, (str, Path))
    return [path_from(argument, one, "paths") for one in (places if several else [places])]  # type: ignore[union-attr]
