"""A recipe: the steps from a dense model to its pruned, recovered, measured and exported ones, as one value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ..errors import LlmprunerError, SettingsError, UnknownNameError, first_line, near
from ..plugins.catalog import Catalog
from ..settings import LoadSettings, RecipeSettings, Settings, StepSettings, flag_of
from ..validation import refusal
from .commands import COMMANDS, DENSE, LAST, Command
from .yaml_file import Lines, read_yaml, scalar
from .yaml_file import Path as Place

S = TypeVar("S", bound=Settings)
_ROUNDS = "rounds"


@dataclass(frozen=True)
class Step:
    """One command. ``given``: the settings as they were given; ``settings``: with all defaults. ``models``: see
    `StepSettings`; None where nothing was given. ``place``: where it stands, for messages."""

    number: int
    command: Command
    name: str
    given: Mapping[str, Any]
    settings: Settings
    models: tuple[str, ...] | None
    prompt: str | None
    place: str

    def job(self, catalog: Catalog) -> Any:
        """What the command does, with components created. Raises `LlmprunerError` for settings that are wrong or have
        no effect together."""
        with self.named():
            return self.command.job(self.settings, catalog)

    def named(self) -> _Named:
        """A context in which the message of every `LlmprunerError` begins with the place of this step, and names
        settings as they are written in a recipe."""
        return _Named(self.place, type(self.settings))


@dataclass(frozen=True)
class Recipe:
    """Steps, and what they share.

    ``model``, ``output``: None where the caller gives them. ``load``: how models are opened, as it was given.
    ``source``: file or name, for messages.
    """

    steps: tuple[Step, ...]
    model: str | None = None
    output: Path | None = None
    load: LoadSettings = field(default_factory=LoadSettings)
    source: str = "recipe"
    _value: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    _lines: Lines = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, reference: str | Path, catalog: Catalog | None = None) -> Recipe:
        """The recipe in a file; with a ``catalog``, also one of a plugin or of llmpruner by its name.

        Raises `SettingsError`, in one line with the place, for what is no recipe: an unknown key, a value out of
        bounds, a key that is given twice.
        """
        text, source = _text(str(reference), catalog)
        value, lines = read_yaml(text, source)
        return cls.of(value, source, lines)

    @classmethod
    def of(cls, value: Mapping[str, Any], source: str = "recipe", lines: Lines | None = None) -> Recipe:
        """The recipe in ``value``, which has the keys of a recipe file. ``lines``: where its parts stand. Raises
        `SettingsError`."""
        return _Reader(source, lines or {}).recipe(value, {})

    def with_values(self, values: Mapping[str, Any]) -> Recipe:
        """The same recipe with other settings: ``{"prune.ratio": 0.3}``. Before the dot: a command (all its steps), the
        name of a step, or its number; after it a setting, or ``settings.NAME.key`` for one of a component. Raises
        `SettingsError`."""
        return _Reader(self.source, self._lines).recipe(self._value, values)

    def check(self, catalog: Catalog) -> list[Any]:
        """The jobs of all steps. Raises `LlmprunerError` for a mistake that needs no model and no file to be seen."""
        jobs = [step.job(catalog) for step in self.steps]
        for step, job in zip(self.steps, jobs, strict=True):
            compares = [m.label() for m in getattr(job, "metrics", ()) if m.needs_reference]
            if compares and len(self.sources(step)) == 1:
                raise SettingsError(
                    f"{step.place}: {compares[0]} compares models with the first one, and only one is measured; put "
                    "the step after prune or recover, or name two under 'models'"
                )
        return jobs

    def sources(self, step: Step) -> tuple[str, ...]:
        """The names of the models that a step reads: ``dense``, and names of earlier steps."""
        before = [one for one in self.steps if one.number < step.number]
        checkpoints = [DENSE, *(one.name for one in before if one.command.checkpoint)]
        if not step.command.several:
            return (checkpoints[-1],)
        if step.models is None:
            return tuple(checkpoints)
        return tuple(dict.fromkeys(checkpoints[-1] if name == LAST else name for name in step.models))


def _text(reference: str, catalog: Catalog | None) -> tuple[str, str]:
    """The text of a recipe, and how messages name it."""
    if catalog is not None and reference in catalog.recipes:
        return catalog.recipes[reference]().text(), f"recipe {reference}"
    path = Path(reference)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8"), reference
    except (OSError, ValueError) as error:
        raise SettingsError(f"{reference} cannot be read: {first_line(error)}") from error
    if path.suffix or len(path.parts) > 1 or catalog is None:
        raise SettingsError(f"recipe file '{reference}' does not exist")
    raise UnknownNameError("recipe", reference, catalog.recipes)


def values_of(texts: Sequence[str]) -> dict[str, Any]:
    """``["prune.ratio=0.3"]``, as the command line gives it, for `Recipe.with_values`. Values are read as YAML. Raises
    `SettingsError`."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[^.\s]+(\.[^.\s]+)+", key):
            raise SettingsError(f"--set {text}: expected STEP.setting=value, such as prune.ratio=0.3")
        try:
            read = scalar(value)
        except (yaml.YAMLError, ValueError):
            read = value
        found[key] = value if isinstance(read, Mapping) else read
    return found


@dataclass(frozen=True)
class _Raw:
    """A step before its settings are checked. ``number``: its place among all steps, from 1; 0 until all are read.
    ``values``: the settings of the command; ``own``: those of the step. ``at``: path of its command in the document."""

    number: int
    command: Command
    values: dict[str, Any]
    own: StepSettings
    at: Place

    @property
    def name(self) -> str:
        return self.own.name or f"{self.number}-{self.command.name}"


class _Reader:
    """Turns values into a `Recipe`."""

    def __init__(self, source: str, lines: Lines) -> None:
        self.source, self.lines = source, lines

    def recipe(self, value: Any, changes: Mapping[str, Any]) -> Recipe:
        if not isinstance(value, Mapping):
            raise self.wrong((), "expected a mapping with 'steps'")
        known = RecipeSettings.model_fields
        self.refuse_unknown(value, known, (), "a recipe")
        steps = list(self.raw_steps(value.get("steps"), ("steps",)))
        if not steps:
            raise self.wrong(("steps",), "expected at least one step under 'steps'")
        steps = [_numbered(number, raw) for number, raw in enumerate(steps, start=1)]
        self.check_names(steps)
        self.change(steps, changes)
        load = value.get("load") or {}
        if not isinstance(load, Mapping):
            raise self.wrong(("load",), "expected a mapping of settings under 'load'")
        own = {key: one for key, one in value.items() if key not in ("load", "steps") and one is not None}
        top = self.settings(RecipeSettings, {**own, "steps": []}, (), "a recipe")
        recipe = Recipe(
            tuple(self.step(raw) for raw in steps),
            top.model,
            top.output,
            self.settings(LoadSettings, load, ("load",), "load"),
            self.source,
            value,
            self.lines,
        )
        self.check_models(recipe)
        return recipe

    def raw_steps(self, value: Any, at: Place) -> Iterator[_Raw]:
        """The steps of a list, with rounds written out."""
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise self.wrong(at, "expected a list of steps under 'steps'")
        for number, one in enumerate(value):
            here = (*at, number)
            step = {one: {}} if isinstance(one, str) else one
            if not isinstance(step, Mapping):
                raise self.wrong(here, f"expected a step: a command ({', '.join(COMMANDS)}) with its settings")
            if _ROUNDS in step:
                yield from self.rounds(step, here)
            else:
                yield self.raw_step(step, here)

    def rounds(self, step: Mapping[str, Any], here: Place) -> Iterator[_Raw]:
        self.refuse_unknown(step, (_ROUNDS, "steps"), here, "a step with rounds")
        count = step[_ROUNDS]
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise self.wrong((*here, _ROUNDS), f"rounds: '{count}': expected a whole number of at least 1")
        for _ in range(count):
            for raw in self.raw_steps(step.get("steps"), (*here, "steps")):
                if raw.own.name is not None and count > 1:
                    raise self.wrong(
                        (*raw.at, "name"), f"'{raw.own.name}' would be the name of {count} steps; leave it out"
                    )
                yield raw

    def raw_step(self, step: Mapping[str, Any], here: Place) -> _Raw:
        own = StepSettings.model_fields
        self.refuse_unknown(step, (*COMMANDS, *own, _ROUNDS), here, "a step")
        named = [key for key in step if key in COMMANDS]
        if len(named) != 1:
            many = f"has {len(named)} commands ({', '.join(named)})" if named else "has no command"
            raise self.wrong(here, f"a step {many}; expected one of {', '.join(COMMANDS)}")
        command = COMMANDS[named[0]]
        values = {} if step[command.name] is None else step[command.name]
        if not isinstance(values, Mapping):
            raise self.wrong(
                (*here, command.name), f"{command.name}: expected a mapping of its settings, found '{values}'"
            )
        given = {key: step[key] for key in own if step.get(key) is not None}
        for key, useful in (("models", command.several), ("prompt", command.prompt)):
            if key in given and not useful:
                raise self.wrong((*here, key), f"'{key}' has no effect on {command.name}; leave it out")
        if command.prompt and "prompt" not in given:
            raise self.wrong(here, f"a step of {command.name} needs a 'prompt' beside it")
        return _Raw(0, command, dict(values), self.settings(StepSettings, given, here, "a step"), (*here, command.name))

    def check_names(self, steps: Sequence[_Raw]) -> None:
        first: dict[str, _Raw] = {}
        for raw in steps:
            if raw.name in (DENSE, LAST):
                raise self.wrong(
                    (*raw.at[:-1], "name"), f"the name '{raw.name}' has a meaning of its own; choose another"
                )
            if raw.name in first:
                where = first[raw.name].number
                raise self.wrong((*raw.at[:-1], "name"), f"step {where} is named '{raw.name}' too; choose another name")
            first[raw.name] = raw

    def change(self, steps: Sequence[_Raw], changes: Mapping[str, Any]) -> None:
        """Apply the values of `Recipe.with_values`."""
        for key, value in changes.items():
            which, _, rest = key.partition(".")
            chosen = [raw for raw in steps if which in (raw.command.name, raw.name, str(raw.number))]
            if not chosen:
                known = (name for raw in steps for name in (raw.command.name, raw.name))
                raise SettingsError(f"{key}: {UnknownNameError('step', which, set(known))}")
            for raw in chosen:
                *outer, last = rest.split(".")
                inside = raw.values
                for part in outer:
                    found = inside.get(part)
                    inside[part] = dict(found) if isinstance(found, Mapping) else {}
                    inside = inside[part]
                inside[last] = value

    def step(self, raw: _Raw) -> Step:
        # None is what an empty value reads as, and what every setting without a value is.
        given = {key: value for key, value in raw.values.items() if value is not None}
        settings = self.settings(raw.command.settings, given, raw.at, raw.command.name, raw.number)
        models = raw.own.models
        return Step(
            raw.number,
            raw.command,
            raw.name,
            given,
            settings,
            models,
            raw.own.prompt,
            self.place(raw.at, raw.number, raw.command.name),
        )

    def check_models(self, recipe: Recipe) -> None:
        """Refuse models that do not exist when a step reads them."""
        known = [DENSE, LAST]
        for step in recipe.steps:
            for name in step.models or ():
                if name not in known:
                    raise SettingsError(f"{step.place}: models: {UnknownNameError('model', name, known)}")
            if step.command.needs_checkpoint and recipe.sources(step) == (DENSE,):
                raise SettingsError(
                    f"{step.place}: no step before it makes a checkpoint; put it after prune or recover"
                )
            if step.command.model:
                known.append(step.name)

    def settings(self, model: type[S], values: Mapping[str, Any], at: Place, what: str, number: int | None = None) -> S:
        """An instance of ``model``. ``what``: has these settings, for messages."""
        self.refuse_unknown(values, model.model_fields, at, what, number)
        try:
            return model(**values)
        except ValidationError as error:
            found = refusal(error)
            key = found.key.partition(".")[0]
            line = self.place((*at, key), number, what) if number else self.place((*at, key))
            if found.kind == "missing":
                raise SettingsError(f"{line}: '{key}' must be given") from error
            raise SettingsError(f"{line}: {key}: {found.value}: {found.expected}") from error

    def refuse_unknown(
        self, values: Mapping[str, Any], known: Any, at: Place, what: str, number: int | None = None
    ) -> None:
        for key in values:
            if key not in known:
                line = self.place((*at, key), number, what) if number else self.place((*at, key))
                hint = near(str(key), known) or "."
                raise SettingsError(f"{line}: {what} has no key '{key}'{hint} Known: {', '.join(known)}")

    def place(self, at: Place, number: int | None = None, command: str = "") -> str:
        """``recipe.yaml, line 7, step 2 (prune)``; the line is that of the innermost part that stands in the file."""
        step = "" if number is None else f", step {number} ({command})"
        while at and at not in self.lines:
            at = at[:-1]
        line = f", line {self.lines[at]}" if at in self.lines else ""
        return f"{self.source}{line}{step}"

    def wrong(self, at: Place, message: str) -> SettingsError:
        return SettingsError(f"{self.place(at)}: {message}")


def _numbered(number: int, raw: _Raw) -> _Raw:
    # The same step stands several times in the list where it is done in rounds.
    return _Raw(number, raw.command, dict(raw.values), raw.own, raw.at)


class _Named:
    """See `Step.named`."""

    def __init__(self, place: str, settings: type[Settings]) -> None:
        self.place, self.model = place, settings

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, LlmprunerError) and not str(error).startswith(self.place):
            # Some classes of errors are made from other arguments than their message.
            error.args = (f"{self.place}: {as_keys(str(error), self.model)}",)


def as_keys(text: str, model: type[Settings]) -> str:
    """A message of the command line with ``round_to`` where it has ``--round-to``, and ``merge: false`` for
    ``--no-merge``."""
    names = {flag_of(model, name): name for name in model.model_fields}
    negated = {f"--no-{flag[2:]}": f"{name}: false" for flag, name in names.items()}
    return re.sub(r"--[a-z][a-z-]*", lambda found: names.get(found[0]) or negated.get(found[0]) or found[0], text)
