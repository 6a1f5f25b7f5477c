"""``llmpruner evaluate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError
from ..evaluation.report import Evaluation, side_by_side
from ..files import write_text
from ..loading.options import LoadOptions
from .console import RichProgress, count, note, size, table
from .options import Models, Seed, catalog_of, check_device, load_options, new_file, parse_names, spliced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..evaluation.report import Evaluation, Line
    from ..evaluation.tasks import LoadedTasks
    from ..loading.model import LoadedModel

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
            "when no tasks are named.",
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
    speed: Annotated[bool, typer.Option("--speed", help="Measure tokens per second and peak memory, too.")] = False,
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
    from ..evaluation.perplexity import PYDOC, read_text
    from ..evaluation.tasks import load_tasks

    if json_file is not None:
        new_file(json_file)
    names = parse_names(tasks, "--tasks") if tasks else ()
    source = perplexity or (None if names else PYDOC)
    if kl and source is None:
        source = PYDOC
    text = None if source is None else read_text(source)
    check_device(options.device)
    suite = load_tasks(names, include_path=include_path) if names else None
    results: list[Evaluation] = []
    reference = None
    for model in models:
        loaded = _open(ctx, model, options)
        if kl and reference is None:
            reference = loaded.model
        results.append(
            _measure(
                loaded,
                suite=suite,
                text=text,
                window=window,
                tokens=tokens,
                reference=reference,
                speed=speed,
                autocast=autocast,
                task_options={
                    "limit": limit,
                    "batch_size": batch_size,
                    "num_fewshot": num_fewshot,
                    "seed": seed,
                },
            )
        )
        del loaded
    if text is not None and results[0].perplexity is not None:
        found = results[0].perplexity
        note(f"perplexity on '{source}': {found.windows} windows of {window} tokens, {window - 1} predictions each")
    show_evaluations(results)
    if json_file is not None:
        rows = [result.as_json() for result in results]
        write_text(json_file, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


def _open(ctx: typer.Context, model: str, options: LoadOptions) -> LoadedModel:
    from ..evaluation.weights import check_weights
    from ..loading.model import load_model

    note(f"loading {model}")
    loaded = load_model(model, catalog_of(ctx), options)
    if loaded.tokenizer is None:
        raise DataError(f"model '{model}' brings no tokenizer, so it cannot be evaluated")
    check_weights(loaded.model, model)
    return loaded


def _measure(
    loaded: LoadedModel,
    *,
    suite: LoadedTasks | None,
    text: str | None,
    window: int,
    tokens: int | None,
    reference: PreTrainedModel | None,
    speed: bool,
    autocast: bool,
    task_options: dict[str, Any],
) -> Evaluation:
    from ..evaluation import cost
    from ..evaluation.perplexity import perplexity
    from ..evaluation.tasks import evaluate_tasks

    progress = RichProgress()
    found = None
    if text is not None:
        found = perplexity(
            loaded.model, loaded.tokenizer, text,
            window=window, tokens=tokens, autocast=autocast, reference=reference, progress=progress,
        )  # fmt: skip
    scores = {}
    if suite is not None:
        progress.status(f"lm-eval: {', '.join(suite.names)}")
        scores = evaluate_tasks(loaded.model, loaded.tokenizer, suite, progress=True, **task_options)
    return Evaluation(
        name=loaded.ref,
        size=cost.size(loaded.model, loaded.graph),
        perplexity=found,
        tasks=scores,
        speed=cost.speed(loaded.model, progress=progress) if speed else None,
    )


def show_evaluations(results: Sequence[Evaluation]) -> None:
    """One column per model, one row per quantity."""
    rows = [(line.label, *(_cell(line, n) for n in range(len(results)))) for line in side_by_side(results)]
    table(None, ("", *(result.name for result in results)), rows)


def _cell(line: Line, number: int) -> str:
    value = line.values[number]
    if value is None:
        return "-"
    if line.label.endswith("bytes"):
        return size(value)
    if value >= 1e5:
        return count(value)
    error = line.errors[number] if line.errors else None
    digits = 4 if value < 10 else 2
    return f"{value:.{digits}f}" + (f" ± {error:.4f}" if error is not None else "")
