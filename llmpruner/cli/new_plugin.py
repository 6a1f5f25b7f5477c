"""``llmpruner new-plugin``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import LlmprunerError
from ..files import check_new_directory
from ..scaffold.model import ModelFacts, describe
from ..scaffold.package import PluginName, render, write
from .console import note, out
from .options import catalog_of


def add_commands(app: typer.Typer) -> None:
    app.command()(new_plugin)


def new_plugin(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the family; the package is llmpruner-NAME.")],
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="The model it is for: a directory, a hub id, or a model type (qwen2).",
        ),
    ] = None,
    package: Annotated[
        str | None,
        typer.Option(
            "--import",
            metavar="PACKAGE",
            help="Installed package that registers the architecture with AutoConfig and AutoModelForCausalLM, where "
            "transformers lacks it.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory to write; must not exist. By default ./llmpruner-NAME."),
    ] = None,
) -> None:
    """Write a plugin package for a model family, with tests that prove every cut and pass as they are."""
    catalog = catalog_of(ctx)
    plugin = PluginName(name)
    if name in catalog.families:
        raise LlmprunerError(f"a family '{name}' exists already in {catalog.families.package_of(name)}; choose another")
    if source is None and package:
        raise LlmprunerError("--import needs a model; name it with --from MODEL")
    directory = check_new_directory(output or Path(plugin.distribution))
    facts = ModelFacts()
    if source is not None:
        note(f"tracing a small {source}")
        facts = describe(source, catalog, package=package)
    write(directory, render(plugin, facts))
    lines = [f"{directory}: family {name}" + "".join(f" for model type {model_type}" for model_type in facts.types)]
    if facts.kinds:
        lines.append(f"can remove: {', '.join(facts.kinds)}")
    lines.append(f"next: pip install -e '{directory}[test]' && pytest {directory}")
    out.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
