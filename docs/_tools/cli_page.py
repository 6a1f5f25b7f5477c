"""The command-line reference, from the signatures that Typer itself reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import Parameter, cleandoc, signature
from pathlib import Path
from typing import Any, get_args

import typer
from installed import own_manager
from rich.text import Text
from typer.models import ArgumentInfo, CommandInfo, OptionInfo

from llmpruner.cli.app import HELP, build_app

GENERAL = "Options"
_TYPES = {int: "INTEGER", float: "FLOAT", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Shown:
    """One argument or option as ``--help`` has it. ``names``: ``--output`` and ``-o``; an argument has none."""

    names: tuple[str, ...]
    value: str
    help: str
    panel: str
    default: str | None
    required: bool


def application() -> typer.Typer:
    """The command line with llmpruner's own plugins."""
    return build_app(own_manager())


def commands(app: typer.Typer) -> Iterator[tuple[str, CommandInfo]]:
    """Name → command, in the order of ``--help``."""
    for command in app.registered_commands:
        assert command.callback is not None
        yield command.name or command.callback.__name__.replace("_", "-"), command


def parameters(callback: Callable[..., Any]) -> list[Shown]:
    """Arguments and options of a command; what Typer passes by itself is left out."""
    found = (_parameter(p) for p in signature(callback, eval_str=True).parameters.values())
    return [p for p in found if p is not None]


def _parameter(parameter: Parameter) -> Shown | None:
    kind, *marks = get_args(parameter.annotation) or (parameter.annotation,)
    info = next((mark for mark in marks if isinstance(mark, (OptionInfo, ArgumentInfo))), None)
    if info is None:
        return None
    kind = next((k for k in (kind, *get_args(kind)) if k in (*_TYPES, bool)), kind)
    required = parameter.default is Parameter.empty
    default = None if required or parameter.default is None else str(parameter.default)
    if isinstance(info, OptionInfo):
        # Inside Annotated, Typer takes the first name for a default.
        declared = [d for d in (info.default, *(info.param_decls or ())) if isinstance(d, str)]
        names = tuple(n for d in declared for n in d.split("/")) or ("--" + parameter.name.replace("_", "-"),)
        value = "" if kind is bool else info.metavar or _TYPES[kind]
        default = None if kind is bool else default
    else:
        names, value = (), info.metavar or parameter.name.upper()
    return Shown(names, value, info.help or "", info.rich_help_panel or GENERAL, default, required)


def render() -> str:
    app = application()
    found = list(commands(app))
    lines = [
        "# Command line",
        "",
        _plain(HELP),
        "",
        "| command | what it does |",
        "|---|---|",
        *(f"| [`{name}`](#{name}) | {_paragraphs(command)[0]} |" for name, command in found),
        "",
        "Every command takes `--help`. `llmpruner --version` shows the version; `--debug`, anywhere on the line, shows "
        "tracebacks. Exit codes: 0 for success, 2 for a mistake that can be mended (one line says how), 3 for a "
        "[recovery](#recover) that made nothing better, 1 for anything else.",
        "",
    ]
    for name, command in found:
        lines += _section(name, command)
    return "\n".join(lines)


def _section(name: str, command: CommandInfo) -> list[str]:
    assert command.callback is not None
    found = parameters(command.callback)
    arguments = [p for p in found if not p.names]
    options = [p for p in found if p.names]
    usage = ["llmpruner", name, *(p.value if p.required else f"[{p.value.strip('[]')}]" for p in arguments)]
    usage += [f"{p.names[0]} {p.value}" for p in options if p.required]
    if len(options) > sum(p.required for p in options):
        usage.append("[OPTIONS]")
    lines = [f"## {name}", ""]
    lines += [line for paragraph in _paragraphs(command) for line in (paragraph, "")]
    lines += ["```text", " ".join(usage), "```", ""]
    lines += [f"- `{p.value}`: {_plain(p.help)}" for p in arguments]
    lines += [""] if arguments else []
    if name == "plan":
        return [*lines, "The options of [`prune`](#prune); `-o` names the file of the plan.", ""]
    for panel in dict.fromkeys([GENERAL, *(p.panel for p in options)]):
        inside = [p for p in options if p.panel == panel]
        if inside:
            lines += [f"**{panel}**", "", *map(_option, inside), ""]
    return lines


def _option(option: Shown) -> str:
    names = ", ".join(f"`{name} {option.value}`" if option.value else f"`{name}`" for name in option.names)
    default = f" *Default:* `{option.default}`." if option.default is not None else ""
    return f"- {names}: {_plain(option.help)}{' *Required.*' if option.required else ''}{default}"


def _paragraphs(command: CommandInfo) -> list[str]:
    text = cleandoc(command.help or (command.callback.__doc__ if command.callback else "") or "")
    return [_plain(paragraph) for paragraph in text.split("\n\n")]


def _plain(text: str) -> str:
    """Help without Rich's markup, on one line per paragraph."""
    return " ".join(Text.from_markup(text).plain.split())
