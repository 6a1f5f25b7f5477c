"""Running a recipe: each step is a call of the Python API, with its result in a folder of the output.

A step is done if ``run.json`` in its folder names the same inputs: settings, models and data. Until its result is whole
it works in ``NAME.DIGEST``, the digest of its inputs, where the same command goes on after an interruption.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..discovery.opening import Opener
from ..engine.stages import read_step, write_step
from ..errors import OutputError, SettingsError, naming, no_tokenizer
from ..files import alone_in, check_new_directory, new_directory, write_text
from ..models.devices import device_of
from ..models.record import RESULTS_FILE
from ..models.reference import data_identity, model_identity, resolve
from ..progress import QUIET
from ..report.base import DENSE
from ..report.sections import training_facts
from ..settings import RunSettings
from .commands import COMMANDS, MEASURES
from .recipe import Recipe, Step


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
    """A recipe that is run with ``functions`` of the Python API. Raises `LlmprunerError` before weights are read."""

    def __init__(
        self, recipe: Recipe, model: str | Path | None, output: str | Path | None, opener: Opener, run: RunSettings,
        functions: Mapping[str, Callable[..., Any]],
    ) -> None:  # fmt: skip
        model, output = model or recipe.model, output or recipe.output
        if model is None or output is None:
            missing = "model" if model is None else "output"
            raise SettingsError(f"{recipe.source} names no {missing}; add '{missing}: …' to it, or give --{missing}")
        self.recipe, self.model, self.output = recipe, str(model), Path(output)
        self.run, self.functions = run, functions
        self.opener = opener = replace(opener, load=recipe.load.model_copy(update=opener.load.given()))
        device_of(opener.load.device)  # refused before any step
        self.dense = replace(opener, progress=QUIET).structure(self.model)
        if not opener.has_tokenizer(self.dense):
            raise no_tokenizer(f"model '{model}'", "the pruned model could read no text; put its files there")
        for step in recipe.steps:
            kind = COMMANDS[step.command]
            with naming(step.place):
                kind.check(step.job)
                if DENSE in step.reads:
                    kind.check_model(step.job, step.settings, self.dense, opener)
            folder = self.output / step.name
            if folder.exists() and read_step(folder) is None:
                raise OutputError(f"'{folder}' exists already, and no step of a recipe made it; move it away")

    def do(self, on_step: Callable[[StepResult], None] | None) -> RecipeResult:
        """Do all steps that are not done. ``on_step`` is called after each."""
        if not self.output.exists():
            check_new_directory(self.output)
        results = []
        with alone_in(self.output):
            for step in self.recipe.steps:
                try:
                    results.append(self._step(step))
                except (KeyboardInterrupt, SystemExit):  # of the user, or of SIGTERM
                    self.opener.progress.status(f"stopped in {step.name}; the same command goes on there")
                    raise
                if on_step is not None:
                    on_step(results[-1])
        return RecipeResult(self.model, self.output, tuple(results))

    def _step(self, step: Step) -> StepResult:
        """Do a step, unless it was done with the same inputs."""
        folder, inputs = self.output / step.name, self.inputs(step)
        before = None if self.run.restart else read_step(folder)
        changed = [key for key in inputs if before and before["inputs"].get(key) != inputs[key]]
        skipped = before is not None and not changed
        note = f", again: {', '.join(changed)} changed" if changed else ""
        note = ": done before with the same inputs, skipped" if skipped else note
        self.opener.progress.status(f"step {step.number} of {len(self.recipe.steps)}, {step.name}{note}")
        value = None if skipped else self._replace(folder, step, inputs)
        shutil.rmtree(folder / "before", ignore_errors=True)
        done: Any = read_step(folder)
        result = json.loads((folder / RESULTS_FILE).read_bytes()) if step.command in MEASURES else done["result"]
        return StepResult(step.name, step.command, folder, skipped, done["seconds"], result, value)

    def _replace(self, folder: Path, step: Step, inputs: Mapping[str, Any]) -> Any:
        """Make the result of a step and move it to ``folder``, with the older one as ``before``. Returns ``value``."""
        digest = sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:8]
        unfinished = f"{step.name}.{'[0-9a-f]' * 8}*"
        for left in (*self.output.glob(unfinished), *self.output.glob(f".{unfinished}")):
            if self.run.restart or digest not in left.name:
                shutil.rmtree(left, ignore_errors=True)
        new, value = self.output / f"{step.name}.{digest}", None
        if read_step(new) is None:  # else an earlier run was killed before it got its name
            shutil.rmtree(new, ignore_errors=True)
            started = time.monotonic()
            with naming(step.place):
                result, value = self._result(step, new)
            seconds = round(time.monotonic() - started, 1)
            write_step(new, inputs, number=step.number, name=step.name, seconds=seconds, result=result)
        if folder.exists():
            folder.rename(new / "before")
        new.rename(folder)
        return value

    def inputs(self, step: Step) -> dict[str, Any]:
        """All that the result of a step depends on, as JSON values, once the models that it reads exist."""
        settings = step.settings.model_dump(mode="json")
        models = {}
        for name in step.reads:
            reference = self.dense.reference if name == DENSE else resolve(self.reference(name), self.opener.catalog)
            models[name] = model_identity(reference) or self.reference(name)
        return {
            "command": step.command, "settings": settings, "load": self.opener.load.model_dump(mode="json"),
            "models": models, "data": data_identity(settings, step.job), "prompt": step.prompt,
        }  # fmt: skip

    def reference(self, name: str) -> str:
        """The path or hub id of a model that a step reads: of a step that wrote one .gguf file, that file."""
        if name == DENSE:
            return self.model
        files = list((self.output / name).glob("*.gguf"))
        return str(files[0] if len(files) == 1 else self.output / name)

    def _result(self, step: Step, output: Path) -> tuple[Any, Any]:
        """Run the command of a step. Returns ``result``, unless it is in a file, and ``value`` of its `StepResult`."""
        call = partial(
            self.functions[step.command], load=self.opener.load, progress=self.opener.progress,
            catalog=self.opener.catalog, **step.settings.given(),
        )  # fmt: skip
        models = {name: self.reference(name) for name in step.reads}
        if step.command in MEASURES:
            if step.command == "generate":
                texts = {name: call(reference, prompt=step.prompt) for name, reference in models.items()}
                value, result = None, [{"name": n, "prompt": step.prompt, "text": t} for n, t in texts.items()]
            else:
                value = call(list(models.values())).named(tuple(models))
                result = value.as_json()
            with new_directory(output) as new:
                write_text(new / RESULTS_FILE, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
            return None, value
        (model,) = models.values()
        if step.command == "prune":
            pruned = call(model, output=output, run=self.run)
            outcome = pruned.outcome
            facts = {"decoder_parameters": outcome.decoder_after, "decoder_removed": outcome.decoder_removed}
            facts |= {"checkpoint": pruned.form, "parameters": outcome.parameters_after}
            return facts, (pruned.plans[-1], outcome)
        made = call(model, output=output)
        if step.command == "recover":
            return {"checkpoint": made.form, **training_facts(made.record["recovery"][-1])}, None
        return {"files": {file.name: file.stat().st_size for file in sorted(output.iterdir()) if file.is_file()}}, made
