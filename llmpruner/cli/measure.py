"""``llmpruner evaluate``, ``llmpruner bench`` and ``llmpruner generate``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..files import check_new_file, write_text
from ..settings import BenchSettings, EvaluateSettings, GenerateSettings, LoadSettings
from ..values import counted
from .console import note, out, print_json, table
from .derive import Json, ModelNames, takes

if TYPE_CHECKING:
    from ..evaluation.bench import BenchCase, BenchResult, Rate
    from ..evaluation.evaluate import Evaluations


@takes(EvaluateSettings, LoadSettings)
def evaluate(
    models: ModelNames,
    arguments: dict[str, Any],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this JSON file.")] = None,
) -> None:
    """Measure models side by side: size, perplexity, divergence, lm-eval tasks."""
    from .. import api

    if json_file is not None:
        check_new_file(json_file)
    results = api.evaluate(models, **arguments)
    show_evaluations(results)
    if json_file is not None:
        write_text(json_file, json.dumps(results.as_json(), indent=2, ensure_ascii=False) + "\n")


def show_evaluations(results: Evaluations) -> None:
    """One column per model, one row per quantity."""
    rows = [(line.label, *line.cells) for line in results.lines]
    table(None, ("", *(result.name for result in results)), rows)


@takes(BenchSettings, LoadSettings)
def bench(
    models: ModelNames,
    arguments: dict[str, Any],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this JSON file.")] = None,
) -> None:
    """Measure how fast models run, next to the speed-up that their sizes allow.

    The first MODEL, as a rule the dense one, is what the others are compared with. All are in memory, and run in turn.
    """
    from .. import api

    if json_file is not None:
        check_new_file(json_file)
    result = api.bench(models, **arguments)
    show_bench(result)
    if json_file is not None:
        write_text(json_file, json.dumps(result.as_json(), indent=2, ensure_ascii=False) + "\n")


def show_bench(result: BenchResult) -> None:
    """A table of prefill and one of decoding."""
    columns = ("Batch", "Prompt", "Model", "Tokens/s (quartiles)", "Speed-up", "Ideal", "Reached")
    table("Prefill", columns, _rows(result, lambda case: case.prefill), left=3)
    table(f"Decoding, {counted(result.new_tokens, 'token')}", columns, _rows(result, lambda case: case.decode), left=3)
    note(
        f"medians of {counted(result.rounds, 'run')} in turn; ideal: by multiply-accumulate operations for the "
        "prefill, by bytes of weights and cache read for decoding; reached: speed-up / ideal"
    )


def _rows(result: BenchResult, rates: Callable[[BenchCase], tuple[Rate, ...]]) -> list[tuple[str, ...]]:
    return [
        (str(case.batch), str(case.prompt_tokens), name, *_cells(rate))
        for case in result.cases
        for name, rate in zip(result.models, rates(case), strict=True)
    ]


def _cells(rate: Rate) -> tuple[str, ...]:
    speed = rate.tokens_per_second
    median, lower, upper = (_number(v) for v in (speed.median, speed.lower_quartile, speed.upper_quartile))
    ideal = "-" if rate.ideal is None else f"{rate.ideal:.2f}"
    share = "-" if rate.share_of_ideal is None else f"{rate.share_of_ideal:.0%}"
    return f"{median} ({lower}–{upper})", f"{rate.speedup.median:.2f}", ideal, share


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


@takes(GenerateSettings, LoadSettings)
def generate(
    models: ModelNames,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to continue, or to answer with --chat.")],
    arguments: dict[str, Any],
    as_json: Json = False,
) -> None:
    """Generate the continuation of a prompt by one or several models."""
    from .. import api

    shared = {"progress": arguments["progress"], "catalog": arguments["catalog"]}
    structures = [api.discover(model, **shared, **arguments["load"].given()) for model in models]
    answers = {each.ref: api.generate(each, prompt, **arguments) for each in structures}
    if as_json:
        print_json({"prompt": prompt, "answers": answers})
        return
    for model, answer in answers.items():
        out.print(f"[bold cyan]{escape(model)}[/]")
        out.print(escape(answer), highlight=False)
