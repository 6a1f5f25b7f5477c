"""The Python API, which the command line calls too.

Every function takes the settings of the command of the same name as keywords (`llmpruner.settings`). A model is a
reference (a directory, a hub id, a ``.gguf`` file, ``demo``), the `Structure` that `discover` returned, or the `Model`
that `load` returned. ``load``: how models are opened; ``run``: memory, and whether to start anew; ``progress``: shows
what is done; ``catalog``: of plugins, by default all installed ones.

Whatever can be refused is refused before weights are read, by a subclass of `LlmprunerError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

from typing_extensions import Unpack

from . import pipeline
from .calibration.chat import Prompt, chat_prompt, format_note
from .component import check_chosen
from .discovery.opening import Opener, Source, listed
from .discovery.oracle import Verdict
from .discovery.verify import verify as _verify
from .errors import DataError, PlanError, SettingsError
from .evaluation.bench import BenchResult, bench_subject
from .evaluation.bench import bench as _bench
from .evaluation.evaluate import ComparedModel, Evaluation, Evaluations, chosen_metrics
from .evaluation.evaluate import evaluate as _evaluate
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
from .models.generation import generate as _generate
from .models.gguf import forget_gguf
from .models.messages import quiet_transformers
from .models.model import Model, Structure
from .models.numbers import check_device
from .models.record import REPORT_FILE
from .models.reference import resolve
from .plugins.catalog import Catalog
from .progress import QUIET, Progress
from .pruning.saving import save as _save
from .pruning.verify import Verification
from .pruning.verify import verify_checkpoint as _verify_checkpoint
from .recipes.recipe import Recipe
from .recipes.run import RecipeResult, RecipeRun, StepResult
from .recovery.data import recovery_setup
from .recovery.recover import recover as _recover
from .report.base import Report, report_page
from .report.evidence import as_written, report_subjects
from .report.summary import sentence
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
    each_ratio,
    flag_of,
    settings_from,
)
from .structure.plan import PruningPlan


def load(
    model: str | Path | Structure,
    *,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **options: Unpack[LoadKeywords],
) -> Model:
    """A model with its weights, in evaluation mode."""
    opener = _opener(settings_from(LoadSettings, options), catalog, progress)
    return opener.weights(opener.structure(model))


def discover(
    model: Source,
    *,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **options: Unpack[LoadKeywords],
) -> Structure:
    """The structure of a model: its family, and in ``graph`` its coupled groups. Reads no weights."""
    try:
        return _opener(settings_from(LoadSettings, options), catalog, progress).structure(model)
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
    opener, values = _opener(load, catalog, progress), _with_ratio(ratio, settings)
    result, _ = pipeline.plan(model, settings_from(PruneSettings, values), opener, run or RunSettings())
    return result


@overload
def prune(
    model: Source, *, ratio: float | None = None, plan: PruningPlan | str | Path | None = None,
    output: str | Path | None = None, load: LoadSettings | None = None, run: RunSettings | None = None,
    progress: Progress = QUIET, catalog: Catalog | None = None, **settings: Unpack[PruneKeywords],
) -> Model: ...  # fmt: skip
@overload
def prune(
    model: str | Path | Structure, *, ratio: Sequence[float], output: str | Path, load: LoadSettings | None = None,
    run: RunSettings | None = None, progress: Progress = QUIET, catalog: Catalog | None = None,
    **settings: Unpack[PruneKeywords],
) -> list[Structure]: ...  # fmt: skip
def prune(
    model: Source, *, ratio: float | Sequence[float] | None = None, plan: PruningPlan | str | Path | None = None,
    output: str | Path | None = None, load: LoadSettings | None = None, run: RunSettings | None = None,
    progress: Progress = QUIET, catalog: Catalog | None = None, **settings: Unpack[PruneKeywords],
) -> Model | list[Structure]:  # fmt: skip
    """Remove the least important units of a model. A `Model` that is passed in is changed in place, and returned.

    ``plan``: a plan to replay, or its file, instead of ``settings``. ``output``: where to save the result; finished
    layers are kept in ``OUTPUT.pruning`` until then, so that the same call continues after an interruption; without
    it, the whole model is in memory. Raises as `plan` does, and `PlanError` for a ``plan`` of another model.

    Several values of ``ratio`` give a folder of ``output`` for each, such as ``OUTPUT/0.1``, with one text and one
    scoring for all; then the structures of the results are returned.

    Processes that ``torchrun`` started share the work; all must make the same call, and the first one writes
    ``output``.
    """
    values = _with_ratio(ratio, settings)
    if plan is not None and values:
        raise SettingsError(
            f"{flag_of(PruneSettings, min(values))} can't be combined with a plan, which has all settings"
        )
    opener, run, folder = _opener(load, catalog, progress), run or RunSettings(), _path(output)
    first, *more = each_ratio(values)
    if more or isinstance(ratio, (list, tuple)):
        if folder is None or isinstance(model, Model):
            raise SettingsError("for several ratios, name a model that is not loaded, and an output for their folders")
        sizes = {f"{each.ratio:g}": each for each in (first, *more)}
        return pipeline.prune_each(model, sizes, folder, opener, run)
    if plan is None:
        return pipeline.prune(model, first, folder, opener, run, first.given())
    if isinstance(plan, PruningPlan):
        return pipeline.prune(model, plan, folder, opener, run, {})
    return pipeline.prune(model, PruningPlan.load(plan), folder, opener, run, {"plan": str(plan)})


def recover(
    model: Source,
    *,
    output: str | Path | None = None,
    work_dir: str | Path | None = None,
    restart: bool = False,
    load: LoadSettings | None = None,
    progress: Progress = QUIET,
    catalog: Catalog | None = None,
    **settings: Unpack[RecoverKeywords],
) -> Model:
    """Restore quality by a short training: by default distillation, on text that the dense model writes. A `Model` that
    is passed in is changed in place, and returned.

    ``output``: where to save the result. ``work_dir``: for the state of the training, from which the same call resumes
    after an interruption; by default ``OUTPUT.recovery``. ``restart``: start anew instead. ``record["recovery"]`` of
    the result lists the trainings; their ``improved`` says whether they helped. Processes that ``torchrun`` started
    share every batch, as for `prune`.
    """
    opener = _opener(load, catalog, progress)
    setup = recovery_setup(settings_from(RecoverSettings, settings), opener.catalog)
    return _recover(model, setup, _path(output), _path(work_dir), opener, restart=restart)


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
    opener = _opener(load, catalog, progress)
    metrics = chosen_metrics(settings_from(EvaluateSettings, settings), opener.catalog)
    opened = [opener.readable(source, "be evaluated") for source in listed(models)]
    compared = [
        ComparedModel(model.ref, model.config, opener.tokenizer(model), partial(opener.weights, model))
        for model in opened
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
    opener, options = _opener(load, catalog, progress), settings_from(BenchSettings, settings)
    runtime = opener.catalog.runtimes.create_only(options.runtime, options.settings)
    check_device(opener.load.device)
    subjects = [bench_subject(source, options, opener) for source in listed(models)]
    return _bench(subjects, runtime, options, progress)


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
    options = settings_from(GenerateSettings, settings)
    opener = _opener(load, catalog, progress)
    opened = opener.readable(model, "read a prompt")
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
        loaded.model, loaded.tokenizer, formatted.text, add_special_tokens=not formatted.has_special_tokens,
        max_new_tokens=options.max_new_tokens, temperature=options.temperature,
        seed=options.seed, stop_text=loaded.family.stop_text if options.chat else None,
        on_text=on_text,
    )  # fmt: skip


def save(model: Model, directory: str | Path) -> str:
    """Write an ordinary Hugging Face directory, whole or not at all.

    Returns its form: ``stock`` (transformers alone loads it), or ``shim`` (layers differ in size; it contains a
    modeling file).
    """
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
    opener, options = _opener(load, catalog, progress), settings_from(ExportSettings, settings)
    exporter = opener.catalog.exporters.create_only(options.to, options.settings)
    directory = check_new_directory(Path(output))
    place = _place(model)
    resolve(place, opener.catalog)
    return _export(Path(place), exporter, directory, partial(opener.as_stored, model), progress)


def run(
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
    catalog = catalog or Catalog()
    steps = Recipe.read(recipe, catalog, values)
    commands = (prune, recover, evaluate, bench, generate, export)
    functions: dict[str, Callable[..., Any]] = {command.__name__: command for command in commands}
    opener = _opener(load, catalog, progress)
    return RecipeRun(steps, model, output, opener, run or RunSettings(), functions).do(on_step)


def verify(structure: Structure, *, seed: int = 0, progress: Progress = QUIET) -> list[Verdict]:
    """Check every kind of unit on a small random model of the same architecture: a cut must equal silencing, that is,
    give the logits of the model in which the weights that read the units are zero. One `Verdict` for each kind."""
    if structure.plans:
        raise PlanError(f"'{structure.ref}' is pruned already; verify the model that it was pruned from")
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
    named = None if base is None else str(base)
    return _verify_checkpoint(Path(_place(directory)), named, _opener(load, catalog, progress))


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
    catalog = catalog or Catalog()
    places = _paths(directories)
    default = places[0] / REPORT_FILE if len(places) == 1 else Path(REPORT_FILE)
    own = settings_from(PageSettings, {"settings": settings or {}}).settings
    sections = tuple(catalog.sections.create(name, own.get(name)) for name in catalog.sections)
    check_chosen(own, sections)
    subjects = report_subjects(places, _paths(results), catalog, load)
    target = Path(path or default)
    if not (target.is_file() and target.read_bytes()[:100].lower().startswith(b"<!doctype html")):
        check_new_file(target)  # a page may replace another page
    page, warnings = report_page(subjects, sections)
    sentences = {}
    for subject in subjects:
        with as_written(f"a file of results of {subject.name}"):
            sentences[subject.name] = sentence(subject)
    write_text(target, page)
    return Report(target, sentences, warnings)


def _with_ratio(ratio: object, settings: PruneKeywords) -> dict[str, Any]:
    return {**settings, **({} if ratio is None else {"ratio": ratio})}


def _opener(load: LoadSettings | None, catalog: Catalog | None, progress: Progress) -> Opener:
    if load is not None and not isinstance(load, LoadSettings):
        raise SettingsError(f"load = {load!r}: write load=LoadSettings(dtype=…, device=…)")
    return Opener(catalog or Catalog(), load or LoadSettings(), progress)


def _paths(places: str | Path | Structure | Sequence[str | Path | Structure]) -> list[Path]:
    return [Path(_place(place)) for place in ([places] if isinstance(places, (str, Path, Structure)) else places)]


def _place(model: str | Path | Structure) -> str:
    """What is read from files: a `Model` in memory may differ from those that it was loaded from."""
    if isinstance(model, Structure) and not isinstance(model, Model):
        return model.ref
    if not isinstance(model, (str, Path)):
        raise SettingsError(f"expected a path, got {type(model).__name__}; name the folder that it is saved in")
    return str(model)


def _path(place: str | Path | None) -> Path | None:
    return None if place is None else Path(place)
