"""Options that several commands share, and options derived from settings models, whose flags, types, help and defaults
are those of the fields.

Values are passed on as text, so that the settings model checks them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from ..settings import Settings, flag_of, option_of

if TYPE_CHECKING:
    from ..plugins.catalog import Catalog

_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH", tuple: "NAMES"}
_OBVIOUS = 100_000
"""Upper bounds from here on are beyond all values that users give, and left out of ``--help``."""
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, hub id, .gguf file, or 'demo'.")]
ModelNames = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Directories, hub ids, .gguf files, or 'demo'.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to write; must not exist.")]


def catalog_of(ctx: typer.Context) -> Catalog:
    """The catalog of plugins of this run."""
    catalog: Catalog = ctx.obj
    return catalog


def takes(
    *, omit: Sequence[str] = (), **models: type[Settings]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that adds the options of settings models to a command. For each name in ``models``, the command gets
    a dictionary of the values that the user gave. ``omit``: fields without an option."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        kept = [p for name, p in own.items() if name not in models]
        derived = {
            name: [
                _parameter(model, f) for f in model.model_fields if f not in omit and not option_of(model, f).advanced
            ]
            for name, model in models.items()
        }
        every = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in (*kept, *(p for d in derived.values() for p in d))]
        # Python requires parameters without defaults first.
        every.sort(key=lambda p: p.default is not Parameter.empty)

        def run(**values: Any) -> None:
            given = {n: _given(values, [p.name for p in fields], models[n].group) for n, fields in derived.items()}
            command(**{p.name: values[p.name] for p in kept}, **given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {p.name: p.annotation for p in every}
        run.__signature__ = Signature(every)  # type: ignore[attr-defined]
        return run

    return decorate


def _given(values: Mapping[str, Any], names: list[str], group: str) -> dict[str, Any]:
    """The values that the user gave; ``--set GROUP.key=value`` is one of ``key``."""
    given = {name: values[name] for name in names if values[name] is not None and values[name] != []}
    own = [text for text in given.get("settings", ()) if group and text.startswith(f"{group}.") and "=" in text]
    if own:
        given["settings"] = [text for text in given["settings"] if text not in own]
    for text in own:
        key, _, value = text.removeprefix(f"{group}.").partition("=")
        given[key] = value
    return given


def _parameter(model: type[Settings], name: str) -> Parameter:
    field, option = model.model_fields[name], option_of(model, name)
    kind = _kind(field.annotation)
    flag = flag_of(model, name)
    flags = option.flags or ((f"{flag}/--no-{flag[2:]}",) if field.default is True else (flag,))
    info = typer.Option(
        *flags,
        help=_help(field) + (_advanced(model) if name == "settings" else ""),
        rich_help_panel=option.panel,
        metavar=None if kind is bool else option.metavar or _METAVARS.get(kind, "TEXT"),
        show_default=False,
    )
    annotation: Any = bool if kind is bool else list[str] if kind is dict else str
    required = field.is_required()
    annotation = annotation if required else annotation | None
    default = Parameter.empty if required else None
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info])


def _advanced(model: type[Settings]) -> str:
    """The settings that have no option of their own."""
    names = [name for name in model.model_fields if option_of(model, name).advanced]
    return f" Of {model.group}: {', '.join(names)}." if names else ""


def _kind(annotation: Any) -> Any:
    """The plain type of a field: ``int`` of ``Annotated[int, …] | None``."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kind(get_args(annotation)[0])
    if origin is Literal:
        return str
    if origin in (Union, type(int | str)):
        return _kind(next(a for a in get_args(annotation) if a is not type(None)))
    return origin or annotation


def _help(field: FieldInfo) -> str:
    facts = [f"{_BOUNDS[key]} {value:g}" for key, value in _bounds(field) if value < _OBVIOUS]
    default = _shown(field)
    facts += [f"default {default}"] if default else []
    return (field.description or "") + (f" ({', '.join(facts)})" if facts else "")


def _bounds(field: FieldInfo) -> list[tuple[str, float]]:
    limits = [(key, getattr(m, key, None)) for m in field.metadata for key in _BOUNDS]
    return [(key, value) for key, value in limits if isinstance(value, int | float)]


def _shown(field: FieldInfo) -> str:
    """The default for ``--help``; empty for None, False and empty values."""
    value = field.default
    if value is None or value is False or field.is_required() or value == {}:
        return ""
    if value is True:
        return "yes"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
