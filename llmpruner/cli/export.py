"""``llmpruner export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..settings import ExportSettings, LoadSettings, settings_from
from .console import RichProgress, done_line
from .derive import Output, catalog_of, takes


def add_commands(app: typer.Typer) -> None:
    app.command()(export)


@takes(settings=ExportSettings, options=LoadSettings)
def export(
    ctx: typer.Context,
    model: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A checkpoint that prune, recover or save wrote; for stock, also a .gguf file."
        ),
    ],
    output: Output,
    settings: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Write a checkpoint in the format of another runtime, and verify it."""
    from .. import api

    line = api.export(
        model, output=output, load=settings_from(LoadSettings, options), progress=RichProgress(),
        catalog=catalog_of(ctx), **settings,
    )  # fmt: skip
    done_line(f"{output}: {line}")
