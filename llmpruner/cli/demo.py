"""``llmpruner demo``: all stages on a real model, without a hub and without a corpus: the recipe ``demo``."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..files import check_new_directory
from .console import RichProgress, count, out
from .derive import catalog_of
from .report import NoReport, write_beside
from .run import show_step

if TYPE_CHECKING:
    from ..recipes.run import StepResult

RECIPE = "demo"
_AFTER = {"prune": "3. Recovery by distillation from the dense model", "recover": "4. Side by side"}
"""Command of a step → the title of what comes after it."""


def add_commands(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    ctx: typer.Context,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Directory for the pruned and the recovered model; must not exist."),
    ] = Path("demo-output"),
    ratio: Annotated[float, typer.Option(min=0.01, max=0.5, help="Share of the decoder's parameters to remove.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Same seed, same inputs: same result.")] = 0,
    no_report: NoReport = False,
) -> None:
    """Prune, recover and compare a real 135M model in minutes, on a CPU, offline.

    Pruned as `llmpruner prune` does by default, on fewer samples, then distilled from the dense model. Text for both
    is written by the model itself, but for some instructions that come with llmpruner; perplexity is measured on
    Python's own documentation. `llmpruner recipes demo` shows the settings.
    """
    from .. import api
    from ..recipes.recipe import Recipe

    started = time.monotonic()
    check_new_directory(output)
    catalog = catalog_of(ctx)
    shared: dict[str, Any] = {"progress": RichProgress(), "catalog": catalog}
    recipe = Recipe.read(RECIPE, catalog).with_values({"prune.ratio": ratio, "prune.seed": seed})
    graph = api.discover(recipe.model or "", **shared).graph
    kinds = Counter(group.kind for group in graph.groups)
    out.rule("1. Discovery")
    out.print(
        f"{count(graph.total_parameters)} parameters, {count(graph.decoder_parameters)} in the decoder; "
        "coupled groups: " + ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    )
    out.rule("2. Pruning and compensation")
    api.run(recipe, output=output, on_step=_show, **shared)
    if not no_report:
        write_beside(ctx, output, say=True)
    last = [step.name for step in recipe.steps if step.command in ("prune", "recover")][-1]
    out.print(f"Try it: llmpruner generate {escape(str(output / last))} --chat --prompt …", highlight=False)
    out.print(f"Done in {time.monotonic() - started:.0f} s.")


def _show(step: StepResult) -> None:
    show_step(step)
    if step.command in _AFTER:
        out.rule(_AFTER[step.command])
