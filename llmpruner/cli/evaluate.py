"""``llmpruner evaluate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..data.documents import PYDOC
from ..evaluation import Evaluation, Metric, MetricSubject, side_by_side
from ..evaluation.metrics import PerplexityMetric, SizeMetric, SpeedMetric, TasksMetric
from ..files import write_text
from ..loading.options import LoadOptions
from .console import RichProgress, note, table
from .options import Models, Seed, catalog_of, check_device, load_options, new_file, parse_names, spliced

Autocast = Annotated[bool, typer.Option("--autocast", help="Compute in bfloat16 under autocast (faster, rounds).")]


def add_commands(app: typer.Typer) -> None:
    app.command()(evaluate)


@spliced(options=load_options)
def evaluate(
    ctx: typer.Context,
    models: Models,
    options: LoadOptions,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="lm-eval tasks, groups or patterns, comma-separated; 'paper' is LLM-Pruner's seven: boolq, piqa, "
            "hellaswag, winogrande, arc_easy, arc_challenge, openbookqa."
        ),
    ] = None,
    perplexity: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Perplexity on a .txt or .jsonl file, or on 'pydoc', a text that every Python brings; the default "
            "when nothing else is named.",
        ),
    ] = None,
    window: Annotated[
        int, typer.Option(min=2, help="Tokens per window of the perplexity; windows do not overlap.")
    ] = 512,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Use the first so many tokens of the text; all by default.")
    ] = None,
    kl: Annotated[
        bool,
        typer.Option("--kl", help="KL divergence from the first MODEL on the same text, too (both are in memory)."),
    ] = False,
    speed: Annotated[bool, typer.Option("--speed", help="Tokens per second and peak memory.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows per task; all by default.")] = None,
    num_fewshot: Annotated[int, typer.Option(min=0, help="Examples shown in each task's prompt.")] = 0,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of further lm-eval task files (offline data, say).")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 8,
    autocast: Autocast = False,
    seed: Seed = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this JSON file.")] = None,
) -> None:
    """Measure models side by side: size, perplexity, lm-eval tasks, speed."""
    from ..evaluation.run import evaluate

    if json_file is not None:
        new_file(json_file)
    check_device(options.device)
    chosen: list[Metric] = [SizeMetric()]
    if perplexity or kl or not (tasks or speed):
        chosen.append(
            PerplexityMetric(text=perplexity or PYDOC, window=window, tokens=tokens, kl=kl, autocast=autocast)
        )
    if speed:
        chosen.append(SpeedMetric())
    if tasks:
        chosen.append(
            TasksMetric(
                names=parse_names(tasks, "--tasks"),
                limit=limit,
                num_fewshot=num_fewshot,
                include_path=include_path,
                batch_size=batch_size,
                seed=seed,
            )
        )
    results = evaluate([partial(_subject, ctx, model, options) for model in models], chosen, RichProgress())
    found = results[0].perplexity
    if found is not None:
        source = perplexity or PYDOC
        note(f"perplexity on '{source}': {found.windows} windows of {window} tokens, {window - 1} predictions each")
    show_evaluations(results)
    if json_file is not None:
        write_text(json_file, json.dumps(results.as_json(), indent=2, ensure_ascii=False) + "\n")


def _subject(ctx: typer.Context, model: str, options: LoadOptions) -> MetricSubject:
    from ..loading.model import load_model

    note(f"loading {model}")
    loaded = load_model(model, catalog_of(ctx), options)
    return MetricSubject(loaded.ref, loaded.model, loaded.tokenizer, loaded.graph)


def show_evaluations(results: Sequence[Evaluation]) -> None:
    """One column per model, one row per quantity."""
    rows = [(line.label, *line.cells) for line in side_by_side(results)]
    table(None, ("", *(result.name for result in results)), rows)
