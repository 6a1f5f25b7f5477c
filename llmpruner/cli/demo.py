"""``llmpruner demo``: all stages on a real model, without a hub and without a corpus: the recipe ``demo``."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..files import check_new_directory
from ..values import counted
from .console import RichProgress, count, out
from .derive import catalog_of
from .measure import show_bench, show_evaluations
from .prune import show_plan
from .report import NoReport, write_beside
from .run import show_texts

if TYPE_CHECKING:
    from ..recipes.recipe import Recipe
    from ..recipes.run import StepResult

RECIPE = "demo"


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
    Python's own documentation.
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
    api.run(recipe, output=output, on_step=lambda step: _show(recipe, step), **shared)
    folders = [escape(str(output / step.name)) for step in recipe.steps if step.command in ("prune", "recover")]
    out.print(f"Files: {' and '.join(folders)}; both load with")
    out.print(f"  llmpruner generate {folders[-1]} --chat --prompt …", highlight=False)
    if not no_report:
        write_beside(ctx, output, say=True)
    out.print(f"Done in {time.monotonic() - started:.0f} s.")


def _show(recipe: Recipe, step: StepResult) -> None:
    """Print the results of a step, and the title of the next one."""
    given = next(each.settings.given() for each in recipe.steps if each.name == step.name)
    if step.command == "prune":
        show_plan(*step.value)
        options = f"--ratio {given['ratio']:g} --samples {given['samples']} --seed {given['seed']}"
        text = escape(quote(given["calibration"]))
        out.print(f"The same as: llmpruner prune demo {options} --calibration {text} -o …", style="dim", soft_wrap=True)
        out.rule("3. Recovery")
    elif step.command == "recover":
        first, last = step.result["losses"]
        examples, steps = step.result["examples"], step.result["steps"]
        out.print(
            f"Distillation on {counted(examples, 'row')} of instructions and of text that the dense model wrote, "
            f"{counted(steps, 'step')}: "
            f"divergence from its predictions {first:.3f} → {last:.3f} nats per token"
        )
        out.rule("4. Side by side")
    elif step.command == "evaluate":
        show_evaluations(step.value)
        perplexity = given["settings"]["perplexity"]
        out.print(
            f"[dim]Perplexity: first {perplexity['tokens']:,} tokens of Python's help topics, windows of "
            f"{given['window']}, bfloat16 autocast.[/]"
        )
    elif step.command == "generate":
        show_texts(step.result)
    elif step.command == "bench":
        show_bench(step.value)
