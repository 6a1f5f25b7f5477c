"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..plugins.catalog import Catalog

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
