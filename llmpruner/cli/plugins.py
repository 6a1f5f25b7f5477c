"""``llmpruner plugins``: the components of all plugins, and the settings of one; and ``llmpruner new-plugin``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..component import Component
from ..errors import LlmprunerError, UnknownNameError
from ..files import check_new_directory
from ..scaffold.package import PACKAGES, ModelFacts, describe, distribution_of, write_package
from .console import note, out, print_json, table
from .derive import Json, bounds_of, takes, type_text


@takes()
def plugins(
    arguments: dict[str, Any],
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show one component with its settings.")] = None,
    as_json: Json = False,
) -> None:
    """List the components of all plugins with their packages; or show one component with its settings."""
    from ..plugins.installed import KINDS

    catalog = arguments["catalog"]
    rows: list[dict[str, Any]] = [
        {"kind": kind, "name": key, "package": catalog[base].package_of(key), "summary": cls.summary}
        for kind, base in KINDS.items()
        for key, cls in catalog[base].items()
    ]
    if name is None:
        if as_json:
            print_json({"plugins": rows, "broken": catalog.plugins.broken})
        else:
            table(None, ("Kind", "Name", "Package", "What it is"), [tuple(row.values()) for row in rows], left=4)
        return
    named = [row for row in rows if row["name"] == name]
    if not named:
        raise UnknownNameError("component", name, {row["name"] for row in rows})
    for row in named:
        cls = catalog[KINDS[row["kind"]]][name]
        row |= {"module": cls.__module__, "settings": settings_of(cls)}
    if as_json:
        print_json(named)
    for component in () if as_json else named:
        what = "{kind} of {package} ({module}): {summary}".format(**component)
        out.print(f"[bold]{escape(name)}[/], {escape(what)}")
        cells = [
            (f"{name}.{s['key']}", f"{s['type']} {s['bounds']}", s["default"], s["description"])
            for s in component["settings"]
        ]
        if cells:
            table("Settings, for --set NAME.key=value", ("Setting", "Type", "Default", "What it is"), cells, left=4)


def settings_of(cls: type[Component]) -> list[dict[str, Any]]:
    """The settings of a component, in order of definition: key, type, default, bounds, description."""
    defaults, settings = cls().record(), []  # a setting without a default is a `SettingsError`
    for key, field in cls.Settings.model_fields.items():
        facts = {"key": key, "type": type_text(field.annotation), "default": defaults[key]}
        settings.append({**facts, "bounds": ", ".join(bounds_of(field)), "description": field.description or ""})
    return settings


@takes()
def new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of what is added; the package is llmpruner-NAME.")],
    arguments: dict[str, Any],
    kind: Annotated[str, typer.Option(help=f"What it adds: {', '.join(PACKAGES)}.", metavar="KIND")] = "family",
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="For a family: its model, as a directory, a hub id, or a model type (qwen2).",
        ),
    ] = None,
    package: Annotated[
        str | None,
        typer.Option(
            "--import",
            metavar="PACKAGE",
            help="For a family: an installed package that registers the architecture with AutoConfig and "
            "AutoModelForCausalLM, where transformers lacks it.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory to write; must not exist. By default ./llmpruner-NAME."),
    ] = None,
) -> None:
    """Write a plugin package with tests, to start from: a model family, an importance criterion or a recovery
    strategy."""
    from ..plugins.installed import KINDS

    catalog = arguments["catalog"]
    distribution = distribution_of(name)
    if kind not in PACKAGES:
        raise UnknownNameError("kind of plugin", kind, PACKAGES)
    if source is not None and kind != "family":
        raise LlmprunerError(f"a {kind} works for all models; leave --from out")
    if package is not None and source is None:
        raise LlmprunerError("--import goes with --from, which names the model")
    registry = catalog[KINDS[PACKAGES[kind]]]
    if name in registry:
        raise LlmprunerError(f"a {registry.kind} '{name}' exists already in {registry.package_of(name)}")
    directory = check_new_directory(output or Path(distribution))
    facts = ModelFacts()
    if source is not None:
        note(f"tracing a small {source}")
        try:
            facts = describe(source, catalog, package=package)
        except LlmprunerError as error:
            if "--trust-remote-code" not in str(error):  # which is no option of this command
                raise
            hint = "put that into a package that registers it, and name it with --import"
            raise LlmprunerError(f"'{source}' brings its own code; {hint}") from error
    write_package(directory, name, facts, kind=kind)
    types = f" for model type {facts.model_type}" if facts.model_type else ""
    typer.echo(f"{directory}: {registry.kind} {name}{types}")
    if facts.kinds:
        typer.echo(f"can remove: {', '.join(facts.kinds)}")
    typer.echo(f"next: pip install -e '{directory}[test]' && pytest {directory}")
