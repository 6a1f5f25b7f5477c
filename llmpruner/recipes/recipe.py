"""Recipe files, read into a `Recipe`, which `recipes.run` executes. Imports no torch.

A recipe is YAML, or a mapping with the same keys. Each step is one command with the settings that it has on the command
line; ``rounds: N`` with ``steps`` stands for these steps N times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import yaml

from ..catalog import Catalog
from ..errors import LlmprunerError, SettingsError, UnknownNameError, first_line, near
from ..evaluation.bench import Runtime
from ..evaluation.evaluate import chosen_metrics
from ..exporters import Exporter
from ..pruning.job import check_data, prune_job
from ..recovery.data import check_setup, recovery_setup
from ..settings import (
    BenchSettings,
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    LoadSettings,
    PruneSettings,
    RecipeSettings,
    RecoverSettings,
    Settings,
    StepSettings,
)
from ..values import validated
from . import NamedRecipe

S = TypeVar("S", bound=Settings)
DENSE: Final = "dense"
"""The model of the recipe, among the models that a step reads."""
LAST: Final = "last"
"""The newest checkpoint."""


class StepKind(NamedTuple):
    """A command that a step can run."""

    settings: type[Settings]
    create: Callable[[Any, Catalog], Any]
    """Makes the job of the settings, and refuses those that contradict each other."""
    check: Callable[[Any], object] = lambda job: None
    """Refuses a job whose data or libraries are missing."""


COMMANDS: Final[Mapping[str, StepKind]] = {
    "prune": StepKind(PruneSettings, prune_job, check_data),
    "recover": StepKind(RecoverSettings, recovery_setup, check_setup),
    "evaluate": StepKind(EvaluateSettings, chosen_metrics, lambda metrics: [metric.prepare() for metric in metrics]),
    "bench": StepKind(BenchSettings, lambda s, catalog: catalog[Runtime].create_only(s.runtime, s.settings)),
    "generate": StepKind(GenerateSettings, lambda s, catalog: s),
    "export": StepKind(
        ExportSettings,
        lambda s, catalog: catalog[Exporter].create_only(s.to, s.settings),
        lambda exporter: exporter.check(),
    ),
}
MEASURES: Final = ("evaluate", "bench", "generate")
"""Commands that read several models: the dense one and all checkpoints so far, or those under ``models``."""


@dataclass(frozen=True)
class Step:
    """One command. ``name``: of its folder. ``reads``: ``dense``, or names of earlier steps. ``place``: file and step,
    for messages. ``job``: of `StepKind.create`."""

    number: int
    command: str
    name: str
    settings: Settings
    reads: tuple[str, ...]
    prompt: str | None
    place: str
    job: Any = field(compare=False)


@dataclass(frozen=True)
class Recipe:
    """Steps, and what they share. ``source``: the file or name, for messages."""

    steps: tuple[Step, ...]
    model: str | None = None
    output: Path | None = None
    load: LoadSettings = field(default_factory=LoadSettings)
    source: str = "recipe"

    @classmethod
    def read(cls, reference: str | Path, catalog: Catalog, values: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe in a file, or of that name. ``values``: as of `of`. Raises `SettingsError`."""
        text, source = _text(str(reference), catalog)
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            mark = getattr(error, "problem_mark", None)
            place = source if mark is None else f"{source}, line {mark.line + 1}"
            problem = getattr(error, "problem", None) or first_line(error)
            raise SettingsError(f"{place}: not valid YAML: {problem}") from error
        return cls.of(value, catalog, source, values)

    @classmethod
    def of(
        cls, value: Mapping[str, Any], catalog: Catalog, source: str = "recipe", values: Mapping[str, Any] | None = None
    ) -> Recipe:
        """The recipe in ``value``, which has the keys of a recipe file. ``values``: other settings, as of
        `llmpruner.run`. Raises `LlmprunerError`, with the step, for mistakes that need no model and no file to be
        seen."""
        top = _settings(RecipeSettings, value, source)
        values = values or {}
        for key in values:
            if not all(key.partition(".")):
                raise SettingsError(f"{key}: expected STEP.setting, such as prune.ratio")
        steps: list[Step] = []
        for entry in _written_out(top.steps, source):
            steps.append(_step(entry, steps, values, source, catalog))
        if not steps:
            raise SettingsError(f"{source}: expected at least one step under 'steps'")
        known = {name for step in steps for name in (step.command, step.name, str(step.number))}
        for key in values:
            if (name := key.partition(".")[0]) not in known:
                raise SettingsError(f"{key}: {UnknownNameError('step', name, known)}")
        return cls(tuple(steps), top.model, top.output, top.load, source)


def values_of(texts: Sequence[str]) -> dict[str, Any]:
    """``{"prune.ratio": 0.3}`` of ``["prune.ratio=0.3"]``; values are read as YAML. Raises `SettingsError`."""
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise SettingsError(f"--set {text}: expected STEP.setting=value, such as prune.ratio=0.3")
        try:
            values[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            values[key] = value
    return values


def _text(reference: str, catalog: Catalog) -> tuple[str, str]:
    """The text of a recipe, and its name in messages."""
    if reference in catalog[NamedRecipe]:
        return catalog[NamedRecipe][reference]().text(), f"recipe {reference}"
    path = Path(reference)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8"), reference
    except (OSError, ValueError) as error:
        raise SettingsError(f"{reference} cannot be read: {first_line(error)}") from error
    if path.suffix or len(path.parts) > 1:
        raise SettingsError(f"recipe file '{reference}' does not exist")
    raise UnknownNameError("recipe", reference, catalog[NamedRecipe])


def _written_out(entries: Any, place: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a list, with rounds written out."""
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise SettingsError(f"{place}: expected a list of steps under 'steps'")
    for entry in entries:
        step = {entry: {}} if isinstance(entry, str) else entry
        if not isinstance(step, Mapping):
            raise SettingsError(f"{place}: '{entry}': expected a step: a command ({', '.join(COMMANDS)}) with settings")
        if "rounds" not in step:
            yield step
            continue
        rounds = step["rounds"]
        if not isinstance(rounds, int) or rounds < 1:
            raise SettingsError(f"{place}: rounds: '{rounds}': expected a whole number of at least 1")
        if more := [key for key in step if key not in ("rounds", "steps")]:
            raise SettingsError(f"{place}: rounds: '{more[0]}' belongs to a step; put it under 'steps'")
        for _ in range(rounds):
            yield from _written_out(step.get("steps"), place)


def _step(
    entry: Mapping[str, Any], before: Sequence[Step], changes: Mapping[str, Any], source: str, catalog: Catalog
) -> Step:
    """The step after those ``before``. ``changes``: as ``values`` of `Recipe.of`."""
    number = len(before) + 1
    commands = [key for key in entry if key in COMMANDS]
    if len(commands) != 1:
        unknown = next((str(key) for key in entry if key not in (*COMMANDS, *StepSettings.model_fields)), None)
        hint = f", got '{unknown}'{near(unknown, COMMANDS)}" if unknown else ""
        raise SettingsError(f"{source}, step {number}: expected one of {', '.join(COMMANDS)}{hint}")
    command = commands[0]
    place = f"{source}, step {number} ({command})"
    options = _settings(StepSettings, {key: value for key, value in entry.items() if key != command}, place)
    name = options.name or f"{number}-{command}"
    if name in (DENSE, LAST, *(step.name for step in before)):
        raise SettingsError(f"{place}: name: '{name}' is taken; choose another name")
    if (options.prompt is None) == (command == "generate"):
        raise SettingsError(f"{place}: 'prompt' belongs to generate, and to it alone")
    values = deepcopy(entry[command] or {})
    for key, value in changes.items():
        step, *path = key.split(".")
        if step in (command, name, str(number)):
            _put(values, path, value, f"{place}: {key}")
    settings = _settings(COMMANDS[command].settings, values, place)
    reads = _reads(command, options.models, before, place)
    with naming(place):
        job = COMMANDS[command].create(settings, catalog)
        for metric in job if command == "evaluate" and len(reads) == 1 else ():
            if metric.needs_reference:
                raise SettingsError(f"{metric.label()} compares models with the first one; name two under 'models'")
    return Step(number, command, name, settings, reads, options.prompt, place, job)


def _put(values: Any, path: Sequence[str], value: Any, place: str) -> None:
    if not isinstance(values, dict):
        raise SettingsError(f"{place}: expected a mapping of settings, got '{values}'")
    key, *inner = path
    if inner:
        values[key] = values.get(key) or {}
        _put(values[key], inner, value, place)
    else:
        values[key] = value


def _reads(command: str, models: Sequence[str] | None, before: Sequence[Step], place: str) -> tuple[str, ...]:
    checkpoints = [DENSE, *(step.name for step in before if step.command in ("prune", "recover"))]
    if command not in MEASURES:
        if models is not None:
            raise SettingsError(
                f"{place}: 'models' belongs to {', '.join(MEASURES)}; {command} reads the newest checkpoint"
            )
        return (checkpoints[-1],)
    if models is None:
        return tuple(checkpoints)
    known = (DENSE, LAST, *(step.name for step in before if step.command not in MEASURES))
    for name in models:
        if name not in known:
            raise SettingsError(f"{place}: models: {UnknownNameError('model', name, known)}")
    return tuple(dict.fromkeys(checkpoints[-1] if name == LAST else name for name in models))


def _settings(model: type[S], values: Any, place: str) -> S:
    """An instance of ``model``; an empty value counts as not given. Raises `SettingsError`."""
    if not isinstance(values, Mapping):
        raise SettingsError(f"{place}: expected a mapping of settings, got '{values}'")
    return validated(model, {str(key): value for key, value in values.items() if value is not None}, place)


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Put the ``place`` of a step before the message of every error."""
    try:
        yield
    except LlmprunerError as error:
        error.args = (f"{place}: {error}",)
        raise
