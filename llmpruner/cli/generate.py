"""``llmpruner generate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from ..settings import GenerateSettings, LoadSettings, settings_from
from .console import RichProgress, out, print_json
from .derive import takes
from .options import Json, ModelNames, catalog_of


def add_commands(app: typer.Typer) -> None:
    app.command()(generate)


@takes(settings=GenerateSettings, options=LoadSettings)
def generate(
    ctx: typer.Context,
    models: ModelNames,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to continue, or to answer with --chat.")],
    settings: dict[str, Any],
    options: dict[str, Any],
    as_json: Json = False,
) -> None:
    """Generate the continuation of a prompt by one or several models."""
    from .. import api

    shared: dict[str, Any] = {"progress": RichProgress(), "catalog": catalog_of(ctx)}
    load = settings_from(LoadSettings, options)
    found = [api.discover(model, **shared, **options) for model in models]
    answers = {each.ref: api.generate(each, prompt, load=load, **shared, **settings) for each in found}
    if as_json:
        print_json({"prompt": prompt, "answers": answers})
        return
    for model, answer in answers.items():
        out.print(f"[bold cyan]{escape(model)}[/]")
        out.print(escape(answer), highlight=False)
