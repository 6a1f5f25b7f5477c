"""Running a recipe: one folder of the output for each step.

A step is done if ``step.json`` in its folder names the same inputs: its settings, the models it reads and the data it
names. Until its result is whole, it works in ``NAME.work``, where the same command goes on after an interruption.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..catalog import Catalog
from ..discovery.opening import Opener
from ..errors import LlmprunerError, OutputError, SettingsError, no_tokenizer, not_pruned
from ..evaluation.bench import bench_subject
from ..evaluation.evaluate import Evaluations
from ..files import alone_in, check_new_directory, new_directory, read_json, write_text
from ..models.numbers import check_device
from ..models.record import RESULTS_FILE, STEP_FILE
from ..models.reference import data_identity, model_identity, resolve
from ..models.tokenizer import has_tokenizer
from ..progress import Progress
from ..pruning.checks import check_job
from ..report.sections import first_and_last, loss_text
from ..settings import LoadSettings, RunSettings
from .recipe import COMMANDS, DENSE, MEASURES, Recipe, Step, naming


@dataclass(frozen=True)
class StepResult:
    """One finished step."""

    name: str
    command: str
    directory: Path
    skipped: bool
    """Whether it was done before, with the same inputs."""
    seconds: float
    """Without those before an interruption."""
    result: Any
    """JSON values: sizes of a prune, facts of a training, what ``evaluate --json`` and ``bench --json`` write, texts,
    files of an export."""
    value: Any = field(default=None, repr=False)
    """`PruningPlan` and `Outcome` of a prune, `Evaluations`, `BenchResult`, the line that `llmpruner.export` returned;
    None of other commands, and where ``skipped``."""

    def as_json(self) -> dict[str, Any]:
        """All fields but ``value``."""
        values = {key: getattr(self, key) for key in ("name", "command", "skipped", "result")}
        return {**values, "directory": str(self.directory), "seconds": round(self.seconds, 1)}


@dataclass(frozen=True)
class RecipeResult:
    """All steps of a recipe, in order. ``model``: the dense model."""

    model: str
    output: Path
    steps: tuple[StepResult, ...]

    def __getitem__(self, name: str) -> StepResult:
        """The step of that name. Raises `KeyError`."""
        return {step.name: step for step in self.steps}[name]

    def as_json(self) -> dict[str, Any]:
        """JSON values, as ``llmpruner run --json`` prints them."""
        return {"model": self.model, "output": str(self.output), "steps": [step.as_json() for step in self.steps]}


class RecipeRun:
    """A recipe that is run with ``functions`` of the Python API, by command. Raises `LlmprunerError` for mistakes that
    need no weights."""

    def __init__(
        self,
        recipe: Recipe,
        model: str | Path | None,
        output: str | Path | None,
        load: LoadSettings,
        run: RunSettings,
        catalog: Catalog,
        progress: Progress,
        functions: Mapping[str, Callable[..., Any]],
    ) -> None:
        model, output = model or recipe.model, output or recipe.output
        if model is None or output is None:
            missing = "model" if model is None else "output"
            raise SettingsError(f"{recipe.source} names no {missing}; add '{missing}: …' to it, or give --{missing}")
        self.recipe, self.model, self.output = recipe, str(model), Path(output)
        self.run, self.catalog, self.progress, self.functions = run, catalog, progress, functions
        self.load = recipe.load.model_copy(update=load.given())
        check_device(self.load.device)
        if not has_tokenizer(resolve(self.model, catalog)):
            raise no_tokenizer(f"model '{self.model}'", "the pruned model could read no text; put its files there")
        opener = Opener(catalog, self.load, progress)
        for step in recipe.steps:
            settings: Any = step.settings
            with naming(step.place):
                COMMANDS[step.command].check(step.job)
                if step.command == "prune" and step.reads == (DENSE,):
                    check_job(step.job, self.dense, opener)
                if step.command == "bench" and DENSE in step.reads:
                    step.job.check(bench_subject(self.dense, settings, opener))
                learns = step.command == "recover" and step.job.reads_dense
                if learns and step.reads == (DENSE,) and not self.dense.plans:
                    raise not_pruned(self.model)
            folder = self.output / step.name
            if folder.exists() and not (folder / STEP_FILE).is_file():
                raise OutputError(f"'{folder}' exists already, and no step of a recipe made it; move it away")

    @cached_property
    def dense(self) -> Any:
        """The structure of the dense model."""
        return Opener(self.catalog, self.load).structure(self.model)

    def do(self, on_step: Callable[[StepResult], None] | None) -> RecipeResult:
        """Do all steps that are not done. ``on_step`` is called after each."""
        if not self.output.exists():
            check_new_directory(self.output)
        results = []
        with alone_in(self.output):
            for step in self.recipe.steps:
                results.append(self._step(step))
                if on_step is not None:
                    on_step(results[-1])
        return RecipeResult(self.model, self.output, tuple(results))

    def _step(self, step: Step) -> StepResult:
        folder, work = self.output / step.name, self.output / f"{step.name}.work"
        before, begun = _record(folder), _record(work)
        inputs = self.inputs(step)
        title = f"step {step.number} of {len(self.recipe.steps)}, {step.name}"
        if before and before["inputs"] == inputs and not self.run.restart:
            self.progress.status(f"{title}: done before with the same inputs, skipped")
            return _finished(step, folder, skipped=True)
        again = ""
        if before and not self.run.restart:
            changed = [key for key, value in inputs.items() if before["inputs"].get(key) != value]
            again = f", again: {', '.join(changed)} changed"
        if self.run.restart or not begun or begun["inputs"] != inputs:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            _write_record(work, {"inputs": inputs})
        else:
            again = ", continued"
        self.progress.status(title + again)
        value = None if _record(work / "result") else self._work(step, work / "result", inputs)
        if folder.exists():
            folder.rename(work / "before")
        (work / "result").rename(folder)
        shutil.rmtree(work, ignore_errors=True)
        return _finished(step, folder, value=value)

    def _work(self, step: Step, result: Path, inputs: Mapping[str, Any]) -> Any:
        """Run a step's command into the folder ``result``. Returns the ``value`` of its `StepResult`."""
        shutil.rmtree(result, ignore_errors=True)
        started = time.monotonic()
        try:
            with naming(step.place):
                facts, value = _DO[step.command](self, step, result)
            if step.command in MEASURES:
                with new_directory(result) as partial:
                    write_text(partial / RESULTS_FILE, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
                facts = None
        except (KeyboardInterrupt, SystemExit):  # of the user, or of SIGTERM
            self.progress.status(f"stopped in {step.name}; the same command goes on there")
            raise
        except LlmprunerError:
            if [file.name for file in result.parent.iterdir()] == [STEP_FILE]:
                shutil.rmtree(result.parent, ignore_errors=True)  # refused before anything was done
            raise
        record = {"number": step.number, "name": step.name, "command": step.command, "inputs": inputs}
        _write_record(result, {**record, "seconds": round(time.monotonic() - started, 1), "result": facts})
        return value

    def inputs(self, step: Step) -> dict[str, Any]:
        """All that the result of a step depends on, as JSON values, once the models that it reads exist."""
        models = {
            name: model_identity(self.dense.reference) or self.model
            if name == DENSE
            else model_identity(resolve(self.reference(name), self.catalog))
            for name in step.reads
        }
        settings = step.settings.model_dump(mode="json")
        return {
            "command": step.command,
            "settings": settings,
            "load": self.load.model_dump(mode="json"),
            "models": models,
            "data": data_identity(settings, step.job),
            "prompt": step.prompt,
        }

    def call(self, step: Step, **more: Any) -> Any:
        """Call the function of a step's command for the model that it reads, or for all of them."""
        models: Any = [self.reference(name) for name in step.reads]
        if step.command not in ("evaluate", "bench"):
            (models,) = models
        return self.functions[step.command](
            models, load=self.load, progress=self.progress, catalog=self.catalog, **more, **step.settings.given()
        )

    def reference(self, name: str) -> str:
        """The path or hub id of a model that a step reads: of a step that wrote one .gguf file, that file."""
        if name == DENSE:
            return self.model
        files = list((self.output / name).glob("*.gguf"))
        return str(files[0] if len(files) == 1 else self.output / name)


def _finished(step: Step, folder: Path, *, skipped: bool = False, value: Any = None) -> StepResult:
    record = read_json(folder / STEP_FILE)
    facts = json.loads((folder / RESULTS_FILE).read_bytes()) if record["result"] is None else record["result"]
    return StepResult(step.name, step.command, folder, skipped, record["seconds"], facts, value)


def _prune(run: RecipeRun, step: Step, output: Path) -> tuple[Any, Any]:
    model = run.call(step, output=output, run=run.run)
    outcome = model.outcome
    facts = {"checkpoint": model.form, "parameters": outcome.parameters_after}
    facts |= {"decoder_parameters": outcome.decoder_after, "decoder_removed": outcome.decoder_removed}
    return facts, (model.plans[-1], outcome)


def _recover(run: RecipeRun, step: Step, output: Path) -> tuple[Any, Any]:
    model = run.call(step, output=output)
    record = model.record["recovery"][-1]
    facts = {key: record[key] for key in ("strategy", "data", "examples", "trainable_parameters", "improved")}
    facts |= {"steps": len(record["losses"]), "losses": list(first_and_last(record) or ())[1:]}
    return {"checkpoint": model.form, **facts, "loss": loss_text(record)}, None


def _export(run: RecipeRun, step: Step, output: Path) -> tuple[Any, Any]:
    line = run.call(step, output=output)
    return {"files": {file.name: file.stat().st_size for file in sorted(output.iterdir()) if file.is_file()}}, line


def _evaluate(run: RecipeRun, step: Step, output: Path) -> tuple[Any, Any]:
    named = Evaluations(replace(each, name=name) for each, name in zip(run.call(step), step.reads, strict=True))
    return named.as_json(), named


def _bench(run: RecipeRun, step: Step, output: Path) -> tuple[Any, Any]:
    result = run.call(step)
    cases = tuple(
        replace(case, models=tuple(replace(each, name=n) for each, n in zip(case.models, step.reads, strict=True)))
        for case in result.cases
    )
    named = replace(result, cases=cases)
    return named.as_json(), named


def _generate(run: RecipeRun, step: Step, output: Path) -> tuple[Any, Any]:
    texts = [
        {"name": name, "prompt": step.prompt, "text": run.call(replace(step, reads=(name,)), prompt=step.prompt)}
        for name in step.reads
    ]
    return texts, None


_DO: Mapping[str, Callable[[RecipeRun, Step, Path], tuple[Any, Any]]] = {
    "prune": _prune, "recover": _recover, "evaluate": _evaluate, "bench": _bench, "generate": _generate,
    "export": _export,
}  # fmt: skip
"""Command → what writes its folder, unless it measures, and returns ``result`` and ``value`` of `StepResult`."""


def _record(folder: Path) -> dict[str, Any] | None:
    return read_json(folder / STEP_FILE) if (folder / STEP_FILE).is_file() else None


def _write_record(folder: Path, value: Mapping[str, Any]) -> None:
    write_text(folder / STEP_FILE, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
