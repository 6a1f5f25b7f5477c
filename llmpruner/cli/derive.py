"""Options of commands, made of the fields of settings models. Values are passed on as text, which the models check."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from ..errors import SettingsError, near
from ..settings import (
    LoadSettings,
    PruneSettings,
    RecoverSettings,
    RunSettings,
    Settings,
    flag_of,
    option_of,
    settings_from,
)
from .console import RichProgress

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, hub id, .gguf file, or 'demo'.")]
ModelNames = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Directories, hub ids, .gguf files, or 'demo'.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to write; must not exist.")]


def takes(*models: type[Settings], omit: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that adds the options of settings models to a command, without the fields in ``omit``. Its
    ``arguments`` are keywords for the function of the Python API."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        written = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in written if p.name != "arguments"]
        options = {
            model: [f for f in model.model_fields if f not in omit and not option_of(model, f)["advanced"]]
            for model in models
        }

        def run(**values: Any) -> None:
            arguments: dict[str, Any] = {"progress": RichProgress(), "catalog": values["ctx"].obj}
            for model, names in options.items():
                explicit = _explicit(values, names, model.group)
                if model in (LoadSettings, RunSettings):
                    arguments["load" if model is LoadSettings else "run"] = settings_from(model, explicit)
                else:
                    arguments |= explicit
            command(**{p.name: values[p.name] for p in parameters}, arguments=arguments)

        context = Parameter("ctx", Parameter.KEYWORD_ONLY, annotation=typer.Context)
        derived = [_parameter(model, name) for model, names in options.items() for name in names]
        signature = Signature([context, *parameters, *derived])
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
        run.__signature__ = signature  # type: ignore[attr-defined]
        return run

    return decorate


def _explicit(values: Mapping[str, Any], names: list[str], group: str) -> dict[str, Any]:
    """The values that the user set; ``--set GROUP.key=value`` is that of ``key``."""
    explicit = {name: values[name] for name in names if values[name] not in (None, [])}
    for text in explicit.get("settings", ()):
        name, _, value = text.partition("=")
        if group and name.startswith(f"{group}.") and name != text:
            explicit[name.removeprefix(f"{group}.")] = value
            explicit["settings"] = [other for other in explicit["settings"] if other != text]
    return explicit


_WITHOUT_OPTION: dict[str, type[Settings]] = {"plan": PruneSettings, "prune": PruneSettings, "recover": RecoverSettings}
"""Command → settings of which some have no option."""


class Command(TyperCommand):
    """A command that answers mistakes of its line in one line; for an unknown option, with the one that was meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if not hasattr(error, "format_message"):  # the module of click's exceptions depends on the version of typer
                raise
            if type(error).__name__ != "NoSuchOption":
                message = " ".join(error.format_message().split()).rstrip(".")
                text = f"`llmpruner {self.name}`: {message[:1].lower()}{message[1:]}; see llmpruner {self.name} --help"
                raise SettingsError(text) from error
            option = str(getattr(error, "option_name", ""))
            field = option.lstrip("-").replace("-", "_")
            model = _WITHOUT_OPTION.get(self.name or "")
            if model is not None and option_of(model, field)["advanced"]:
                hint = f"; write {flag_of(model, field)}=…"
            else:
                hint = near(option, [flag for parameter in self.params for flag in parameter.opts])
            raise SettingsError(f"`llmpruner {self.name}` has no option {option}{hint}") from error


_METAVARS = {
    "int": "INTEGER", "float": "NUMBER", "ByteSize": "SIZE", "list of int": "NUMBERS", "list of text": "NAMES",
    "dict": "NAME.key=value",
}  # fmt: skip


def _parameter(model: type[Settings], name: str) -> Parameter:
    """The field ``name`` as an option."""
    field, option = model.model_fields[name], option_of(model, name)
    kind = type_text(field.annotation).removesuffix(" | none")
    text, facts = field.description or "", bounds_of(field)
    if field.default not in (None, False, {}) and not field.is_required():
        value = field.default
        facts.append(f"default {','.join(map(str, value)) if isinstance(value, tuple) else value}")
    if facts:
        text += f" ({', '.join(facts)})"
    without_option = [other for other in model.model_fields if option_of(model, other)["advanced"]]
    if name == "settings" and without_option:
        text += f" Of {model.group}: {', '.join(without_option)}."
    metavar = None if kind == "bool" else _METAVARS.get(kind, "TEXT")
    info = typer.Option(flag_of(model, name), help=text, rich_help_panel=option["panel"], metavar=metavar)
    annotation: Any = bool if kind == "bool" else list[str] if kind == "dict" else str
    if field.is_required():
        return Parameter(name, Parameter.KEYWORD_ONLY, annotation=Annotated[annotation, info])
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation | None, info])


def bounds_of(field: FieldInfo) -> list[str]:
    """``["above 0", "at most 1"]``; without bounds beyond all values that users give."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = [(text, getattr(data, key, None)) for data in field.metadata for key, text in words.items()]
    return [f"{text} {value:g}" for text, value in limits if isinstance(value, int | float) and value < 100_000]


def type_text(annotation: Any) -> str:
    """``float``, ``int | none``, or the possible values: ``mean | max``."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(parts[0])
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (Union, UnionType):
        return " | ".join(map(type_text, parts))
    if origin in (tuple, list):
        return f"list of {type_text(parts[0])}"
    return {type(None): "none", str: "text"}.get(annotation) or (origin or annotation).__name__
