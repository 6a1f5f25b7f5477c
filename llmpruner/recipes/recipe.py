"""Recipe files, read into a `Recipe`, which `recipes.run` executes. Imports no torch.

A recipe is YAML, or a mapping with the same keys. Each step is one command with the settings that it has on the command
line; ``rounds: N`` with ``steps`` stands for these steps N times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import isfile
from pathlib import Path
from typing import Any

import yaml

from ..catalog import Catalog
from ..errors import SettingsError, UnknownNameError, first_line, naming, near
from ..report.base import DENSE
from ..settings import LoadSettings, RecipeSettings, RoundsSettings, S, Settings, StepSettings
from ..values import validated
from . import NamedRecipe
from .commands import COMMANDS, MEASURES


@dataclass(frozen=True)
class Step:
    """``name``: of its folder. ``reads``: ``dense``, or names of earlier steps. ``place``: for messages."""

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
    model: str | None
    output: Path | None
    load: LoadSettings
    source: str

    @classmethod
    def read(
        cls, recipe: Mapping[str, Any] | str | Path, catalog: Catalog, values: Mapping[str, Any] | None = None
    ) -> Recipe:
        """A recipe of a file, of a name, or of a mapping. ``values``: as of `run_recipe`. Raises `LlmprunerError`."""
        value, source = (recipe, "recipe") if isinstance(recipe, Mapping) else _loaded(str(recipe), catalog)
        top, values = _settings(RecipeSettings, value, source), values or {}
        steps: list[Step] = []
        for entry in _written_out(top.steps, source):
            steps.append(_step(entry, steps, values, source, catalog))
        known = {name for step in steps for name in (step.command, step.name, str(step.number))}
        for key in values:
            name, _, setting = key.partition(".")
            if not name or not setting:
                raise SettingsError(f"{key}: expected STEP.setting, such as prune.ratio")
            if name not in known:
                raise SettingsError(f"{key}: {UnknownNameError('step', name, known)}")
        return cls(tuple(steps), top.model, top.output, top.load, source)


def _loaded(reference: str, catalog: Catalog) -> tuple[Any, str]:
    """The content of a recipe file, and its name in messages."""
    path, source = Path(reference), reference
    is_file = isfile(path)  # which takes names that are too long
    if not is_file and (path.suffix or len(path.parts) > 1):
        raise SettingsError(f"recipe file '{reference}' does not exist")
    try:
        if reference in catalog[NamedRecipe] or not is_file:
            text, source = catalog[NamedRecipe][reference]().text(), f"recipe {reference}"
        else:
            text = path.read_text(encoding="utf-8")
        return yaml.safe_load(text), source
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"{reference} cannot be read: {first_line(error)}") from error
    except (yaml.YAMLError, ValueError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise SettingsError(f"{source}{line}: not valid YAML: {problem or first_line(error)}") from error


def _written_out(entries: Sequence[Any], source: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a list, with rounds written out."""
    for entry in entries:
        step = {entry: None} if isinstance(entry, str) else entry
        if "rounds" in step:
            block = _settings(RoundsSettings, step, f"{source}, rounds")
            yield from block.rounds * list(_written_out(block.steps, source))
        else:
            yield step


def _step(
    entry: Mapping[str, Any], before: Sequence[Step], changes: Mapping[str, Any], source: str, catalog: Catalog
) -> Step:
    """The step after those ``before``. ``changes``: as ``values`` of `Recipe.read`."""
    number = len(before) + 1
    command = next((key for key in entry if key not in StepSettings.model_fields), "")
    if command not in COMMANDS:
        hint = near(command, COMMANDS)
        raise SettingsError(f"{source}, step {number}: expected one of {', '.join(COMMANDS)}, got '{command}'{hint}")
    place = f"{source}, step {number} ({command})"
    options = _settings(StepSettings, {key: value for key, value in entry.items() if key != command}, place)
    name = options.name or f"{number}-{command}"
    if name in (DENSE, "last", *(step.name for step in before)):
        raise SettingsError(f"{place}: name: '{name}' is taken; choose another name")
    if (options.prompt is None) == (command == "generate"):
        raise SettingsError(f"{place}: 'prompt' belongs to generate, and to it alone")
    values = entry[command] or {}
    for key, value in changes.items():
        step, *path = key.split(".")
        if step in (command, name, str(number)):
            values = _with_value(values, path, value)
    settings = _settings(COMMANDS[command].settings, values, place)
    with naming(place):
        reads = _reads(command, options.models, before)
        job = COMMANDS[command].create(settings, catalog)
        for metric in job if command == "evaluate" and len(reads) == 1 else ():
            if metric.needs_reference:
                raise SettingsError(f"{metric.label()} compares models with the first one; name two under 'models'")
    return Step(number, command, name, settings, reads, options.prompt, place, job)


def _with_value(values: Any, path: Sequence[str], value: Any) -> Any:
    """Nested ``values`` with another one at ``path``."""
    if not path:
        return value
    key, *inner = path
    others = values if isinstance(values, Mapping) else {}
    return {**others, key: _with_value(others.get(key), inner, value)}


def _reads(command: str, models: Sequence[str] | None, before: Sequence[Step]) -> tuple[str, ...]:
    """``dense`` or names of steps, for what a step has under ``models``."""
    checkpoints = (DENSE, *(step.name for step in before if step.command in ("prune", "recover")))
    if models is None:
        return checkpoints if command in MEASURES else checkpoints[-1:]
    if command not in MEASURES:
        raise SettingsError(f"'models' belongs to {', '.join(MEASURES)}; {command} reads the newest checkpoint")
    known = {DENSE: DENSE, "last": checkpoints[-1]}
    known |= {step.name: step.name for step in before if step.command not in MEASURES}
    for name in models:
        if name not in known:
            raise SettingsError(f"models: {UnknownNameError('model', name, known)}")
    return tuple(dict.fromkeys(known[name] for name in models))


def _settings(model: type[S], values: Any, place: str) -> S:
    """An instance of ``model``; an empty value counts as not given. Raises `SettingsError`."""
    if not isinstance(values, Mapping):
        raise SettingsError(f"{place}: expected a mapping of settings, got '{values}'")
    empty = [key for key, value in values.items() if value is None and key in model.model_fields]
    return validated(model, {str(key): value for key, value in values.items() if key not in empty}, place)
