"""``llmpruner evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import check_own_file, json_text, write_text
from ..settings import EvaluateSettings, LoadSettings, settings_from
from .console import RichProgress, table
from .derive import takes
from .options import ModelNames, catalog_of

if TYPE_CHECKING:
    from ..evaluation.evaluate import Evaluations


def add_commands(app: typer.Typer) -> None:
    app.command()(evaluate)


@takes(settings=EvaluateSettings, options=LoadSettings)
def evaluate(
    ctx: typer.Context,
    models: ModelNames,
    settings: dict[str, Any],
    options: dict[str, Any],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this JSON file.")] = None,
) -> None:
    """Measure models side by side: size, perplexity, lm-eval tasks, speed."""
    from .. import api

    if json_file is not None:
        check_own_file(json_file, '[{"name"', "result of evaluate --json")
    results = api.evaluate(
        models, load=settings_from(LoadSettings, options), progress=RichProgress(), catalog=catalog_of(ctx), **settings
    )
    show_evaluations(results)
    if json_file is not None:
        write_text(json_file, json_text(results.as_json(), indent=2))


def show_evaluations(results: Evaluations) -> None:
    """One column per model, one row per quantity."""
    rows = [(line.label, *line.cells) for line in results.lines]
    table(None, ("", *(result.name for result in results)), rows)
