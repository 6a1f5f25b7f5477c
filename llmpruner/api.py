"""The Python API, which the command line calls too.

Every function takes the settings of the command of the same name as keywords (`llmpruner.settings`). A model is a
reference (a directory, a hub id, a ``.gguf`` file, ``demo``), the `Structure` that `discover` returned, or the `Model`
that `load` returned. ``load``: how models are opened; ``run``: memory, and whether to start anew; ``progress``: shows
what is done; ``catalog``: of plugins, by default all installed ones.

Whatever can be refused is refused before weights are read, by a subclass of `LlmprunerError`; what needs no model,
before torch is imported, which takes seconds: each function names its model, output, components and data first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from typing_extensions import Unpack

from .catalog import Catalog
from .component import check_chosen
from .errors import DataError, PlanError, SettingsError
from .evaluation.bench import Runtime
from .exporters import export as _export
from .files import check_new_directory, check_new_file, write_text
from .keywords import (
    BenchKeywords,
    EvaluateKeywords,
    ExportKeywords,
    GenerateKeywords,
    LoadKeywords,
    PruneKeywords,
    RecoverKeywords,
)
from .models.record import REPORT_FILE
from .models.reference import Reference, resolve
from .plugins.installed import load_catalog
from .progress import QUIET, Progress, is_first
from .pruning.job import Job, check_data, replay_job
from .recipes.commands import COMMANDS
from .recipes.recipe import Recipe
from .report.base import Report, ReportSection, report_page
from .settings import (
    BenchSettings,
    GenerateSettings,
    LoadSettings,
    PageSettings,
    PruneSettings,
    RunSettings,
    flag_of,
    settings_from,
)

if TYPE_CHECKING:
    from .discovery.opening import Opener, Source
    from .discovery.oracle import Verdict
    from .evaluation.bench import BenchResult
    from .evaluation.evaluate import Evaluation, Evaluations
    from .models.model import Model, Structure
    from .pruning.verify import Verification
    from .recipes.run import RecipeResult, StepResult
    from .structure.outcome import Outcome
    from .structure.plan import PruningPlan


def load(
    model: str | Path | Structure,
    *,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **options: Unpack[LoadKeywords],
) -> Model:
    """A model with its weights, in evaluation mode."""
    catalog = catalog or load_catalog()
    reference = _reference(model, catalog)
    opener = _opener(settings_from(LoadSettings, options), catalog, progress)
    return opener.weights(opener.structure(reference))


def discover(
    model: Source,
    *,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **options: Unpack[LoadKeywords],
) -> Structure:
    """The structure of a model: its family, and in ``graph`` its coupled groups. Reads no weights."""
    catalog = catalog or load_catalog()
    reference = _reference(model, catalog)
    opener = _opener(settings_from(LoadSettings, options), catalog, progress)
    from .models.gguf import forget_gguf

    try:
        return opener.structure(reference)
    finally:
        forget_gguf()  # kept for loading the weights, which need not follow


def plan(
    model: Source,
    *,
    ratio: float | None = None,
    load: LoadSettings | None = None,
    run: RunSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[PruneKeywords],
) -> PruningPlan:
    """Select what to remove, without changing the model: ``plan(model, ratio=0.2, method="best")``. Raises
    `SelectionError` for an amount that can't be reached, besides what all functions raise."""
    return plan_and_outcome(model, _with_ratio(ratio, settings), load, run, progress, catalog)[0]


def plan_and_outcome(
    model: Source, settings: Mapping[str, Any], load: LoadSettings | None, run: RunSettings | None,
    progress: Progress, catalog: Catalog | None,
) -> tuple[PruningPlan, Outcome]:  # fmt: skip
    """`plan`, and the sizes of the model before and after the cut."""
    catalog = catalog or load_catalog()
    reference, job = _reference(model, catalog), _job("prune", settings, catalog)
    opener = _opener(load, catalog, progress)
    from . import pipeline

    return pipeline.plan(reference, job, opener, run or RunSettings())


def prune(
    model: Source,
    *,
    ratio: float | None = None,
    plan: PruningPlan | str | Path | None = None,
    output: str | Path | None = None,
    load: LoadSettings | None = None,
    run: RunSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[PruneKeywords],
) -> Model:
    """Remove the least important units of a model. A `Model` that is passed in is changed in place, and returned.

    ``plan``: a plan to replay, or its file, instead of ``settings``. ``output``: where to save the result; finished
    layers are kept in ``OUTPUT.pruning`` until then, so that the same call continues after an interruption; without
    it, the whole model is in memory. Raises as `plan` does, and `PlanError` for a ``plan`` of another model.

    Processes that ``torchrun`` started share the work; all must make the same call, and the first one writes
    ``output``.
    """
    catalog = catalog or load_catalog()
    reference, folder = _reference(model, catalog), _new(output)
    job: Job
    if plan is None:
        job = _job("prune", _with_ratio(ratio, settings), catalog)
    elif given := _with_ratio(ratio, settings):
        raise SettingsError(
            f"{flag_of(PruneSettings, min(given))} can't be combined with a plan, which has all settings"
        )
    else:
        job = replay_job(plan, catalog)
        check_data(job)
    opener = _opener(load, catalog, progress)
    from . import pipeline

    return pipeline.prune(reference, job, folder, opener, run or RunSettings())


def prune_each(
    model: str | Path | Structure,
    *,
    ratios: Sequence[float],
    output: str | Path,
    load: LoadSettings | None = None,
    run: RunSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[PruneKeywords],
) -> list[Structure]:
    """`prune` by several ratios, each into a folder of ``output``, such as ``OUTPUT/0.1``, with one text, one
    scoring and one run of the dense model for all. Returns the structures of the results. Raises `ModelError` for a
    model in memory."""
    catalog = catalog or load_catalog()
    reference, folder = _reference(model, catalog), Path(output)
    if not folder.with_name(folder.name + ".pruning").is_dir():  # else some ratios may be finished
        check_new_directory(folder)
    jobs = {
        f"{job.settings.ratio:g}": job
        for job in (_job("prune", {**settings, "ratio": ratio}, catalog) for ratio in ratios)
    }
    if not jobs:
        raise SettingsError("no ratio is named; name at least one")
    opener = _opener(load, catalog, progress)
    from . import pipeline

    return pipeline.prune_each(reference, jobs, folder, opener, run or RunSettings())


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
    """Restore quality by a short training: by default distillation, on text that the dense model writes. A `Model` that
    is passed in is changed in place, and returned.

    ``output``: where to save the result. ``work_dir``: for the state of the training, from which the same call resumes
    after an interruption; by default ``OUTPUT.recovery``. ``record["recovery"]`` of the result lists the trainings;
    their ``improved`` says whether they helped. Processes that ``torchrun`` started share every batch, as for `prune`.
    """
    catalog = catalog or load_catalog()
    reference, folder = _reference(model, catalog), _new(output)
    if output is None and work_dir is None:
        raise SettingsError("recovery needs a directory for its state: give output, or work_dir")
    setup, opener = _job("recover", settings, catalog), _opener(load, catalog, progress)
    from .recovery.recover import recover as _recover

    restart = (run or RunSettings()).restart
    return _recover(reference, setup, folder, _path(work_dir), opener, restart=restart)


@overload
def evaluate(  # type: ignore[overload-overlap]
    models: Source, *, on_result: Callable[[Evaluation], None] | None = None, load: LoadSettings | None = None,
    progress: Progress = QUIET, catalog: Catalog | None = None, **settings: Unpack[EvaluateKeywords],
) -> Evaluation: ...  # fmt: skip
@overload
def evaluate(
    models: Sequence[Source], *, on_result: Callable[[Evaluation], None] | None = None,
    load: LoadSettings | None = None, progress: Progress = QUIET, catalog: Catalog | None = None,
    **settings: Unpack[EvaluateKeywords],
) -> Evaluations: ...  # fmt: skip
def evaluate(
    models: Source | Sequence[Source], *, on_result: Callable[[Evaluation], None] | None = None,
    load: LoadSettings | None = None, progress: Progress = QUIET, catalog: Catalog | None = None,
    **settings: Unpack[EvaluateKeywords],
) -> Evaluation | Evaluations:  # fmt: skip
    """Measure models: size, perplexity, KL divergence, lm-eval tasks, and metrics of plugins. The first model is
    the reference of those that compare. One is in memory at a time (with ``kl``, next to the first). ``on_result``:
    called with the result of each model, as a later one may fail.

    One model gives one `Evaluation` (``evaluate(model, perplexity="text.txt").perplexity``), a list one of each.
    """
    catalog = catalog or load_catalog()
    references = [_reference(model, catalog) for model in listed(models)]
    metrics = _job("evaluate", settings, catalog)
    opener = _opener(load, catalog, progress)
    from .evaluation.evaluate import ComparedModel
    from .evaluation.evaluate import evaluate as _evaluate
    from .models.model import Structure

    opened = [opener.structure(reference) for reference in references]
    for structure in opened:
        opener.check_tokenizer(structure, "it cannot be evaluated")
    compared = [
        ComparedModel(structure.ref, structure.config, opener.tokenizer(structure), partial(opener.weights, structure))
        for structure in opened
    ]
    results = _evaluate(compared, metrics, progress, on_result)
    return results[0] if isinstance(models, (str, Path, Structure)) else results


def bench(
    models: Source | Sequence[Source],
    *,
    load: LoadSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[BenchKeywords],
) -> BenchResult:
    """Measure how fast models process prompts and decode, in tokens per second, against the first and against the
    speed-up that their sizes allow. All are in memory at the same time, and run in turn."""
    catalog = catalog or load_catalog()
    references = [_reference(model, catalog) for model in listed(models)]
    options = settings_from(BenchSettings, settings)
    runtime = catalog[Runtime].create_only(options.runtime, options.settings)
    opener = _opener(load, catalog, progress)
    from .evaluation.bench import bench as _bench
    from .evaluation.bench import bench_subject

    return _bench([bench_subject(each, options, opener) for each in references], runtime, options, progress)


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
    ``history``: with ``chat``, the (question, answer) pairs before. ``on_text``: called with each piece of the text."""
    catalog = catalog or load_catalog()
    reference, options = _reference(model, catalog), settings_from(GenerateSettings, settings)
    opener = _opener(load, catalog, progress)
    from .calibration.chat import Prompt, chat_prompt, format_note
    from .models.generation import generate as _generate

    opened = opener.structure(reference)
    opener.check_tokenizer(opened, "it cannot read a prompt")
    if not prompt and not options.chat:
        tokenizer: Any = opener.tokenizer(opened)
        if not tokenizer(prompt)["input_ids"]:
            raise DataError("the prompt is empty")
    loaded = opener.weights(opened)
    formatted = Prompt(prompt, False)
    if options.chat:
        formatted = chat_prompt(loaded.family, loaded.tokenizer, prompt, history)
        if note := format_note(loaded.ref, loaded.family, loaded.tokenizer):
            progress.status(note)
    return _generate(
        loaded.network, loaded.tokenizer, formatted.text, add_special_tokens=not formatted.has_special_tokens,
        max_new_tokens=options.max_new_tokens, temperature=options.temperature,
        seed=options.seed, stop_text=loaded.family.chat_format.stop_text if options.chat else None,
        on_text=on_text,
    )  # fmt: skip


def save(model: Model, directory: str | Path) -> str:
    """Write an ordinary Hugging Face directory, whole or not at all.

    Returns its form: ``stock`` (transformers alone loads it), or ``shim`` (layers differ in size; it contains a
    modeling file).
    """
    from .pruning.saving import save as _save

    return _save(model, check_new_directory(Path(directory)))


def export(
    model: str | Path | Structure,
    *,
    output: str | Path,
    load: LoadSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[ExportKeywords],
) -> str:
    """Write a model in the format of the exporter ``to``; returns one line on how to load it. Raises `CheckpointError`
    where the result gives other outputs than ``model``."""
    catalog = catalog or load_catalog()
    source, reference = _folder_of(model), _reference(model, catalog)
    directory = check_new_directory(Path(output))
    exporter = _job("export", settings, catalog)
    opener = _opener(load, catalog, progress)
    return _export(Path(source), exporter, directory, partial(opener.as_stored, reference), progress)


def run_recipe(
    recipe: Mapping[str, Any] | str | Path,
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
    """Do the steps of a recipe, each with its result in a folder of ``output``; a step that was done before with the
    same inputs is skipped, and an interrupted one goes on.

    ``recipe``: a file, the name of a recipe of llmpruner or of a plugin, or a mapping with the keys of a recipe file.
    ``model``, ``output``, ``values`` and ``load`` replace what the recipe has. A key of ``values``, such as
    ``prune.ratio``, has a command (for all its steps), the name of a step, or its number before the dot, and after it a
    setting, or ``settings.NAME.key`` for one of a component. ``on_step``: called after each step, skipped ones too.
    """
    catalog = catalog or load_catalog()
    steps = Recipe.read(recipe, catalog, values)
    opener = _opener(load, catalog, progress)
    from .recipes.run import RecipeRun

    commands = (prune, recover, evaluate, bench, generate, export)
    functions: dict[str, Callable[..., Any]] = {command.__name__: command for command in commands}
    return RecipeRun(steps, model, output, opener, run or RunSettings(), functions).do(on_step)


def verify(structure: Structure, *, seed: int = 0, progress: Progress = QUIET) -> list[Verdict]:
    """Check every kind of unit on a small random model of the same architecture: a cut must equal silencing, that is,
    give the logits of the model in which the weights that read the units are zero. One `Verdict` for each kind."""
    if structure.plans:
        raise PlanError(f"'{structure.ref}' is pruned already; verify the model that it was pruned from")
    from .discovery.verify import verify as _verify
    from .models.messages import quiet_transformers

    progress.status("cutting and silencing a small random model")
    with quiet_transformers():
        return _verify(structure.family, structure.config, kinds=structure.graph.kinds, seed=seed)


def verify_checkpoint(
    directory: str | Path | Structure,
    *,
    base: str | Path | None = None,
    load: LoadSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
) -> Verification:
    """Check a checkpoint directory: files against the hashes in its record, shapes against its plans, and weights and
    logits against the dense model, if it is on this machine. ``base``: the dense model, instead of that in the record.
    Damage is in the result."""
    on_cpu = (load or LoadSettings()).model_copy(update={"device": "cpu"})
    opener = _opener(on_cpu, catalog or load_catalog(), progress)
    from .pruning.verify import verify_checkpoint as _verify_checkpoint

    named = None if base is None else str(base)
    return _verify_checkpoint(Path(_folder_of(directory)), named, opener)


def write_report(
    directories: str | Path | Structure | Sequence[str | Path | Structure],
    path: str | Path | None = None,
    *,
    results: str | Path | Sequence[str | Path] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    load: LoadSettings | None = None,
    catalog: Catalog | None = None,
) -> Report:
    """Write an HTML page about pruned models: size, speed and quality next to the dense model, and what was cut.

    ``directories``: checkpoints, or outputs of recipes, each of which stands for its last checkpoint; several are
    compared. ``path``: of the page; by default ``report.html``, in the directory or, for several, in the current
    folder. ``results``: files that ``evaluate --json`` and ``bench --json`` wrote; those of a recipe are known.
    """
    catalog = catalog or load_catalog()
    places = [Path(_folder_of(each)) for each in listed(directories)]
    default = places[0] / REPORT_FILE if len(places) == 1 else Path(REPORT_FILE)
    own = settings_from(PageSettings, {"settings": settings or {}}).settings
    sections = tuple(catalog[ReportSection].create(name, own.get(name)) for name in catalog[ReportSection])
    check_chosen(own, sections)
    target = Path(path or default)
    if not (target.is_file() and target.read_bytes()[:100].lower().startswith(b"<!doctype html")):
        check_new_file(target)  # a page may replace another page
    files = [Path(file) for file in ([results] if isinstance(results, (str, Path)) else results)]
    opener = _opener(load, catalog, QUIET)
    from .report.evidence import as_written, report_subjects
    from .report.summary import sentence

    subjects = report_subjects(places, files, opener)
    page, warnings = report_page(subjects, sections)
    sentences = {}
    for subject in subjects:
        with as_written(f"a file of results of {subject.name}"):
            sentences[subject.name] = sentence(subject)
    write_text(target, page)
    return Report(target, sentences, warnings)


def _with_ratio(ratio: float | None, settings: PruneKeywords) -> dict[str, Any]:
    return {**settings, **({} if ratio is None else {"ratio": ratio})}


def _job(command: str, settings: Mapping[str, Any], catalog: Catalog) -> Any:
    """The job of a command, once its data and libraries are seen to be there."""
    kind = COMMANDS[command]
    job = kind.create(settings_from(kind.settings, settings), catalog)
    kind.check(job)
    return job


def _reference(model: Source, catalog: Catalog) -> Reference | Structure:
    """Where a model is that the user named; other values are left to `Opener.structure`."""
    return resolve(model, catalog) if isinstance(model, (str, Path)) else model


def _opener(load: LoadSettings | None, catalog: Catalog, progress: Progress) -> Opener:
    """Imports torch. Raises `LlmprunerError` for a device that is not there."""
    if load is not None and not isinstance(load, LoadSettings):
        raise SettingsError(f"load = {load!r}: write load=LoadSettings(dtype=…, device=…)")
    if load is not None and load.device != "auto":
        from .models.devices import device_of

        device_of(load.device)
    from .discovery.opening import Opener

    return Opener(catalog, load or LoadSettings(), progress if is_first() else QUIET)


def listed(models: Source | Sequence[Source]) -> list[Source]:
    """One model or several, as a list. Raises `SettingsError` for none."""
    several = isinstance(models, Iterable) and not isinstance(models, str)
    sources: list[Source] = list(models) if several else [models]  # type: ignore[arg-type, list-item]
    if not sources:
        raise SettingsError("no model is named; name at least one")
    return sources


def _folder_of(model: str | Path | Structure) -> str:
    """What is read from files: a `Model` in memory may differ from those that it was loaded from."""
    if isinstance(model, (str, Path)):
        return str(model)
    from .models.model import Model, Structure

    if isinstance(model, Structure) and not isinstance(model, Model):
        return model.ref
    raise SettingsError(f"expected a path, got {type(model).__name__}; name the folder that it is saved in")


def _new(output: str | Path | None) -> Path | None:
    """``output``, if a directory can be created there."""
    return None if output is None else check_new_directory(Path(output))


def _path(place: str | Path | None) -> Path | None:
    return None if place is None else Path(place)
