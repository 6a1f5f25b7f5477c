"""Running a recipe: every step whose result is not there yet, or was made of other inputs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal

from ..discovery.structure import load_structure
from ..errors import SettingsError, no_tokenizer
from ..evaluation.evaluate import Evaluations
from ..files import check_new_directory, json_text, read_json, write_text
from ..folders import new_directory
from ..models.model import Model, Structure
from ..models.numbers import check_device
from ..models.record import read_record
from ..models.reference import resolve
from ..models.tokenizer import brings_tokenizer
from ..progress import QUIET, Progress
from ..recovery.losses import first_and_last, loss_text
from ..settings import LoadSettings, RunSettings
from ..validation import check_type
from .checks import check_prune
from .commands import DENSE
from .inputs import digest, first_change, inputs_of, model_fingerprint
from .results import PlannedStep, RecipeResult, StepResult
from .state import State, locked
from .step_forecast import step_forecast

if TYPE_CHECKING:
    from ..evaluation.bench import BenchResult
    from ..plugins.catalog import Catalog
    from .recipe import Recipe, Step

RESULTS = "results.json"
"""The file of a step that measures."""


@dataclass(frozen=True)
class Actions:
    """The functions of the Python API, which are above this package."""

    prune: Callable[..., Model]
    recover: Callable[..., Model]
    evaluate: Callable[..., Evaluations]
    bench: Callable[..., BenchResult]
    generate: Callable[..., str]
    export: Callable[..., str]


@dataclass(frozen=True)
class _Status:
    """``ready``: whether the models that the step reads exist. ``reason``: why it is to be done again."""

    status: Literal["done", "interrupted", "to do"]
    ready: bool = True
    reason: str = ""


class Session:
    """A recipe with all that a run of it needs. Raises `LlmprunerError` for mistakes that need no weights."""

    def __init__(
        self,
        recipe: Recipe,
        model: str | Path | None,
        output: str | Path | None,
        load: LoadSettings | None,
        run: RunSettings | None,
        catalog: Catalog,
        progress: Progress = QUIET,
    ) -> None:
        check_type("load", load, (LoadSettings, NoneType), "LoadSettings")
        check_type("run", run, (RunSettings, NoneType), "RunSettings")
        check_type("model", model, (str, Path, NoneType), "a path or a hub id")
        check_type("output", output, (str, Path, NoneType), "a path")
        chosen, folder = model or recipe.model, output or recipe.output
        if chosen is None:
            raise SettingsError(f"{recipe.source} names no model; add 'model: …' to it, or give --model")
        if folder is None:
            raise SettingsError(f"{recipe.source} names no output; add 'output: …' to it, or give --output")
        self.recipe, self.model, self.output = recipe, str(chosen), Path(folder)
        self.catalog, self.progress, self.how = catalog, progress, run or RunSettings()
        self.load = LoadSettings(**{**_given(recipe.load), **_given(load or LoadSettings())})
        # Checkpoints that the steps make are local, and have no revisions.
        self.own_load = LoadSettings(**{key: one for key, one in _given(self.load).items() if key != "revision"})
        self.jobs = dict(zip((step.name for step in recipe.steps), recipe.check(catalog), strict=True))
        check_device(self.load.device)
        resolve(self.model, catalog, revision=self.load.revision)
        self.state = State(self.output, progress)

    def _lock(self, stack: ExitStack) -> None:
        """Be alone in the folder until ``stack`` ends, and read the state again."""
        self.state = State(self.output, self.progress, stack.enter_context(locked(self.output)))

    @cached_property
    def dense(self) -> Structure:
        return load_structure(self.model, self.catalog, self.load)

    @cached_property
    def _dense_fingerprint(self) -> Any:
        return _digest(model_fingerprint(self.dense, self.catalog, self.state.hashes))

    def reference(self, name: str) -> str:
        """The model ``name`` of the recipe, as other functions take it. A step that wrote one ``.gguf`` file is that
        file."""
        if name == DENSE:
            return self.model
        folder = self.output / name
        # Not of the files that are there: the user may have converted the model into its folder.
        files = [file for file in self.state.steps[name]["files"] if "/" not in file and file.endswith(".gguf")]
        return str(folder / files[0] if len(files) == 1 else folder)

    def load_of(self, name: str) -> LoadSettings:
        return self.load if name == DENSE else self.own_load

    def structure(self, name: str) -> Structure:
        return self.dense if name == DENSE else load_structure(self.reference(name), self.catalog, self.own_load)

    def inputs(self, step: Step) -> dict[str, Any]:
        """All that the result of a step depends on, once the models that it reads exist."""
        models = {name: self._fingerprint(name) for name in self.recipe.sources(step)}
        found = inputs_of(
            step, self.jobs[step.name], models, self.load, self.dense.family.name, self.catalog, self.state.hashes
        )
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain

    def _fingerprint(self, name: str) -> Any:
        return self._dense_fingerprint if name == DENSE else _digest(self.state.steps[name]["files"])

    def statuses(self) -> dict[str, _Status]:
        """Name → status of every step, as it is now. Raises `OutputError` for results that the user has changed."""
        found: dict[str, _Status] = {}
        for step in self.recipe.steps:
            missing = [name for name in self.recipe.sources(step) if name in found and found[name].status != "done"]
            found[step.name] = self._waiting(step, missing) if missing else self.status(step)
        return found

    def _waiting(self, step: Step, missing: list[str]) -> _Status:
        if step.name not in self.state.steps:
            return _Status("to do", False)
        if step.name not in self.state.running:
            # Before the steps that come first are done.
            self.state.is_there(step.name)
            self.state.check_removable(step.name)
        return _Status("to do", False, f"{missing[0]} is to be done again")

    def status(self, step: Step) -> _Status:
        """Of a step whose models exist. Raises `OutputError` for a result that the user has changed."""
        record, begun = self.state.steps.get(step.name), self.state.goes_on(step.name)
        if begun is not None:
            changed = first_change(begun, {**self.inputs(step), **self._way()})
            return _Status("to do", reason=changed) if changed else _Status("interrupted")
        if record is None or step.name in self.state.running:
            return _Status("to do")
        there = self.state.is_there(step.name)
        if changed := first_change(record["inputs"], self.inputs(step)):
            self.state.check_removable(step.name)
            return _Status("to do", reason=changed)
        return _Status("done") if there else _Status("to do", reason="its folder is gone")

    def _way(self) -> dict[str, Any]:
        """What an interrupted step cannot be continued without, but its result hardly depends on."""
        return {"run": {"max_memory": self.how.max_memory}}

    def check(self, statuses: Mapping[str, _Status]) -> None:
        """Raise for what keeps any of the steps that are to be done from being done, as far as it can be known without
        weights."""
        todo = [step for step in self.recipe.steps if statuses[step.name].status != "done"]
        if todo and not brings_tokenizer(self.model, self.catalog):
            raise no_tokenizer(
                f"model '{self.model}'",
                "a pruned model could read no text; put its files (tokenizer.model, say) into the folder",
            )
        for step in todo:
            job = self.jobs[step.name]
            with step.named():
                step.command.check(job)
                (first, *_) = self.recipe.sources(step)
                if step.command.name == "prune" and statuses[step.name].ready:
                    source = self.structure(first)
                    check_prune(job, source, tokenizer=True)
                    if self.how.max_memory is not None:
                        # Raises where it is too little.
                        self._forecast(step, source)

    def plan(self) -> Iterator[PlannedStep]:
        """What a run would do."""
        statuses = self.statuses()
        self.check(statuses)
        for step in self.recipe.steps:
            status, text = statuses[step.name], ""
            facts: dict[str, Any] = {}
            if status.status != "done":
                source = self.structure(self.recipe.sources(step)[0]) if status.ready else None
                with step.named():
                    text, facts = self._forecast(step, source)
            yield PlannedStep(
                step.name, step.command.name, status.status, status.reason, self.recipe.sources(step), text, facts
            )

    def _forecast(self, step: Step, source: Structure | None) -> tuple[str, dict[str, Any]]:
        (first, *_) = self.recipe.sources(step)
        load = self.load_of(first)
        return step_forecast(step, self.jobs[step.name], source, self.dense, load, self.how, self.catalog)

    def run(self, actions: Actions, on_step: Callable[[StepResult], None] | None = None) -> RecipeResult:
        """Do all steps that are not done. ``on_step`` is called after each."""
        with ExitStack() as held:
            if self.output.exists():
                self._lock(held)
            statuses = self._anew() if self.how.restart else self.statuses()
            self.check(statuses)
            if not self.output.exists():
                check_new_directory(self.output)
                self._lock(held)
            if self.how.restart:
                self.state.clear()
            results = []
            for step in self.recipe.steps:
                results.append(self._do(step, actions))
                if on_step is not None:
                    on_step(results[-1])
            return RecipeResult(self.model, self.output, tuple(results))

    def _anew(self) -> dict[str, _Status]:
        """As `statuses`, where no step has been done."""
        return {step.name: _Status("to do", self.recipe.sources(step) == (DENSE,)) for step in self.recipe.steps}

    def _do(self, step: Step, actions: Actions) -> StepResult:
        count = f"step {step.number} of {len(self.recipe.steps)}, {step.name}"
        folder, status = self.output / step.name, self.status(step)
        if status.status == "done":
            self.progress.status(f"{count}: done before with the same inputs, skipped")
            record = self.state.steps[step.name]
            return StepResult(
                step.name, step.command.name, folder, True, record["seconds"], self._result(step, record["result"])
            )
        again = {"interrupted": ", continued"}.get(status.status, f", again: {status.reason}" if status.reason else "")
        self.progress.status(count + again)
        inputs = self.inputs(step)
        started, value = time.monotonic(), None
        try:
            with step.named():
                if not self.state.begin(step.name, {**inputs, **self._way()}):
                    value = _DO[step.command.name](self, step, actions, folder)
        except (KeyboardInterrupt, SystemExit):  # of the user, or of SIGTERM
            self.progress.status(f"stopped in {step.name}; the same command goes on there")
            raise
        seconds = time.monotonic() - started
        facts = self._facts(step, folder)
        self.state.finish(step.name, inputs, facts, seconds, [one.name for one in self.recipe.steps])
        return StepResult(step.name, step.command.name, folder, False, seconds, self._result(step, facts), value)

    def _facts(self, step: Step, folder: Path) -> Any:
        """The facts about a finished step, as JSON values: they follow from its folder alone, so that they are the
        same where the process was killed before they were recorded. None for measurements, which are in a file."""
        if step.command.name == "prune":
            (source,) = self.recipe.sources(step)
            before, after = self.structure(source).graph, load_structure(str(folder), self.catalog, self.own_load).graph
            return {
                "checkpoint": _form(folder),
                "parameters": after.total_parameters,
                "decoder_parameters": after.decoder_parameters,
                "decoder_removed": 1 - after.decoder_parameters / before.decoder_parameters,
            }
        if step.command.name == "recover":
            record = (read_record(folder) or {}).get("recovery", [{}])[-1]
            kept = ("strategy", "data", "examples", "trainable_parameters")
            facts: dict[str, Any] = {}
            if (found := first_and_last(record)) is not None:
                facts = {"steps": len(record["losses"]), "losses": list(found[1:]), "loss": loss_text(record)}
            return {"checkpoint": _form(folder), **{key: record[key] for key in kept if key in record}, **facts}
        if step.command.name == "export":
            return {"files": {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}}
        return None

    def _result(self, step: Step, facts: Any) -> Any:
        if facts is not None:
            return facts
        return json.loads((self.output / step.name / RESULTS).read_text(encoding="utf-8"))

    def shared(self, name: str) -> dict[str, Any]:
        """Keywords of a function that reads the model ``name``."""
        return {"load": self.load_of(name), "progress": self.progress, "catalog": self.catalog}


def _prune(session: Session, step: Step, actions: Actions, folder: Path) -> Any:
    (source,) = session.recipe.sources(step)
    how = RunSettings(**{key: one for key, one in _given(session.how).items() if key != "restart"})
    made = actions.prune(session.reference(source), output=folder, run=how, **session.shared(source), **step.given)
    return made.plans[-1], made.outcome


def _recover(session: Session, step: Step, actions: Actions, folder: Path) -> None:
    (source,) = session.recipe.sources(step)
    actions.recover(session.reference(source), output=folder, **session.shared(source), **step.given)


def _evaluate(session: Session, step: Step, actions: Actions, folder: Path) -> Evaluations:
    names = session.recipe.sources(step)
    found = actions.evaluate(
        [session.reference(name) for name in names],
        **{**session.shared(DENSE), "load": [session.load_of(name) for name in names]},
        **step.given,
    )
    named = Evaluations(replace(one, name=name) for one, name in zip(found, names, strict=True))
    _write(folder, named.as_json())
    return named


def _bench(session: Session, step: Step, actions: Actions, folder: Path) -> BenchResult:
    names = session.recipe.sources(step)
    found = actions.bench(
        [session.reference(name) for name in names],
        **{**session.shared(DENSE), "load": [session.load_of(name) for name in names]},
        **step.given,
    )
    named = replace(found, models=names)
    _write(folder, named.as_json())
    return named


def _generate(session: Session, step: Step, actions: Actions, folder: Path) -> None:
    texts = [
        {
            "name": name,
            "prompt": step.prompt,
            "text": actions.generate(session.reference(name), step.prompt, **session.shared(name), **step.given),
        }
        for name in session.recipe.sources(step)
    ]
    _write(folder, texts)


def _export(session: Session, step: Step, actions: Actions, folder: Path) -> str:
    (source,) = session.recipe.sources(step)
    return actions.export(session.reference(source), output=folder, **session.shared(source), **step.given)


_DO: Mapping[str, Callable[[Session, Step, Actions, Path], Any]] = {
    "prune": _prune,
    "recover": _recover,
    "evaluate": _evaluate,
    "bench": _bench,
    "generate": _generate,
    "export": _export,
}


def _write(folder: Path, value: Any) -> None:
    with new_directory(folder) as partial:
        write_text(partial / RESULTS, json_text(value, indent=2))


def _form(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    return "shim" if "llmpruner" in read_json(folder / "config.json") else "stock"


def _given(settings: LoadSettings | RunSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.model_fields_set}


def _digest(value: Any) -> Any:
    """A fingerprint as one short value; that of a model of the hub, with name and commit, as it is."""
    if "hub" in value and "commit" in value:
        return value
    return digest(value)
