"""``llmpruner new-plugin``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import LlmprunerError, SettingsError
from ..files import check_new_directory
from ..scaffold.package import KINDS, PluginName, kind_named, render, write
from .console import note, out
from .options import catalog_of


def add_commands(app: typer.Typer) -> None:
    app.command()(new_plugin)


def new_plugin(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of what is added; the package is llmpruner-NAME.")],
    kind: Annotated[str, typer.Option(help=f"What it adds: {', '.join(KINDS)}.", metavar="KIND")] = "family",
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
    from ..plugins.catalog import KINDS as CATALOG

    catalog = catalog_of(ctx)
    plugin = PluginName(name)
    adds = kind_named(kind)
    registry = catalog.registry(next(known.name for known in CATALOG.values() if known.hook == adds.hook))
    if name in registry:
        raise LlmprunerError(
            f"a {registry.kind} '{name}' exists already in {registry.package_of(name)}; choose another"
        )
    for option, value in (("--from", source), ("--import", package)):
        if value is not None and kind != "family":
            raise SettingsError(f"{option} has no effect with --kind {kind}, which works for all models; leave it out")
    if source is None and package:
        raise LlmprunerError("--import needs a model; name it with --from MODEL")
    directory = check_new_directory(output or Path(plugin.distribution))
    facts = None
    if source is not None:
        from ..scaffold.model import describe

        note(f"tracing a small {source}")
        facts = describe(source, catalog, package=package)
    write(directory, render(plugin, facts, kind=kind))
    types = "".join(f" for model type {model_type}" for model_type in facts.types) if facts else ""
    if facts and facts.parent:
        types = f" for models of the family {facts.parent.family}"
    lines = [f"{directory}: {adds.title} {name}{types}"]
    if facts and facts.kinds:
        lines.append(f"can remove: {', '.join(facts.kinds)}")
    lines.append(f"next: pip install -e '{directory}[test]' && pytest {directory}")
    out.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
