"""``llmpruner evaluate``, ``bench``, ``generate`` and ``report``, and the reports that other commands write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..errors import LlmprunerError
from ..evaluation.bench import BenchResult
from ..evaluation.evaluate import Evaluation, Evaluations
from ..files import check_new_file, write_text
from ..models.record import REPORT_FILE
from ..models.reference import resolve
from ..progress import is_first
from ..report.base import Report
from ..report.sections import SPEED_COLUMNS, speed_rows
from ..settings import BenchSettings, EvaluateSettings, GenerateSettings, LoadSettings, PageSettings
from ..values import counted
from .console import done_line, note, out, print_json, table, warning_line
from .derive import Json, ModelNames, takes

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write everything to this JSON file.")]


@takes(EvaluateSettings, LoadSettings)
def evaluate(models: ModelNames, arguments: dict[str, Any], json_file: JsonFile = None) -> None:
    """Measure models side by side: size, perplexity, divergence, lm-eval tasks."""
    from .. import api

    if json_file is not None:
        check_new_file(json_file)
    results: list[Evaluation] = []
    try:
        show_evaluations(api.evaluate(models, on_result=results.append, **arguments))
    finally:
        if results:  # those before a model that failed, too
            _write_json(json_file, [result.as_json() for result in results])
    note("next: llmpruner export DIR --to gguf -o OUT, for llama.cpp and Ollama")


def _write_json(file: Path | None, value: Any) -> None:
    if file is not None:
        write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def show_evaluations(results: Evaluations) -> None:
    """Print a column for each model, a row for each quantity."""
    rows = [(line.label, *line.cells) for line in results.lines]
    names = [result.name for result in results]
    short = [Path(name).name for name in names]
    table(None, ("", *(short if len(set(short)) == len(short) else names)), rows)
    meanings = {
        "MACs": "MACs: multiply-accumulate operations to decode a token",
        "KL": "KL: how far predictions are from those of the first model, in nats per token (0: the same)",
    }
    if said := [text for start, text in meanings.items() if any(label.startswith(start) for label, *_ in rows)]:
        note("; ".join(said))


@takes(BenchSettings, LoadSettings)
def bench(models: ModelNames, arguments: dict[str, Any], json_file: JsonFile = None) -> None:
    """Measure how fast models run, next to the speed-up that their sizes allow.

    The first MODEL, as a rule the dense one, is what the others are compared with. All are in memory, and run in turn.
    """
    from .. import api

    if json_file is not None:
        check_new_file(json_file)
    result = api.bench(models, **arguments)
    show_bench(result)
    _write_json(json_file, result.as_json())


def show_bench(result: BenchResult) -> None:
    """Print a table of prefill and one of decoding."""
    values = result.as_json()
    for title, stage in (("Prefill", "prefill"), (f"Decoding, {counted(result.new_tokens, 'token')}", "decode")):
        table(title, SPEED_COLUMNS, speed_rows(values, stage), left=3)
    note(
        f"medians of {counted(result.rounds, 'run')} in turn; ideal: by multiply-accumulate operations for the "
        "prefill, by bytes of weights and cache read for decoding; reached: speed-up / ideal"
    )


@takes(GenerateSettings, LoadSettings)
def generate(
    models: ModelNames,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to continue, or to answer with --chat.")],
    arguments: dict[str, Any],
    as_json: Json = False,
) -> None:
    """Generate the continuation of a prompt by one or several models."""
    references = [resolve(model, arguments["catalog"]) for model in models]
    from .. import api
    from ..discovery.opening import Opener

    opener = Opener(arguments["catalog"], arguments["load"], arguments["progress"])
    structures = [opener.structure(reference) for reference in references]
    for structure in structures:  # all, before any answers
        opener.check_tokenizer(structure, "it cannot read a prompt")
    answers = {}
    for structure in structures:
        answer = answers[structure.ref] = api.generate(structure, prompt, **arguments)
        if not as_json:
            out.print(f"[bold cyan]{escape(structure.ref)}[/]")
            typer.echo(answer)  # rich would break lines, and take tabs apart
    if as_json:
        print_json({"prompt": prompt, "answers": answers})


@takes(PageSettings, LoadSettings, omit=("family", "dtype", "device", "revision"))
def report(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="Checkpoints of llmpruner, or outputs of recipes; several are compared.",
            exists=True, file_okay=False,
        ),
    ],
    arguments: dict[str, Any],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o",
            help="The page; by default report.html, in DIR or, for several, in the current folder.",
        ),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            "--results",
            metavar="FILE",
            help="Results of `evaluate --json` or `bench --json` with these models and the dense one. Repeatable; "
            "those of a recipe are found without.",
        ),
    ] = None,
) -> None:  # fmt: skip
    """Write an HTML page about a pruned model: size, speed and quality next to the dense model, and what was cut.

    The page is one file that loads nothing. `prune`, `run` and `demo` write it too. Reads no weights.
    """
    from .. import api

    options: dict[str, Any] = {name: arguments.get(name) for name in ("catalog", "load", "settings")}
    page = api.write_report(directories, output, results=results or (), **options)
    _show_report(page, sentences=True)
    done_line(str(page.path))


def write_next_to(
    directory: Path, arguments: Mapping[str, Any], *, sentences: bool = False, checkpoints: Sequence[Path] = ()
) -> None:
    """Write ``report.html`` into ``directory``; a failure is only a warning. ``checkpoints``: in it, those to show."""
    from .. import api

    if not is_first():
        return
    try:
        options: dict[str, Any] = {name: arguments.get(name) for name in ("catalog", "load")}
        page = api.write_report(checkpoints or directory, directory / REPORT_FILE, **options)
    except LlmprunerError as error:
        warning_line(f"no report was written: {error}")
        return
    _show_report(page, sentences=sentences)
    note(f"report written to {page.path}")


def _show_report(page: Report, *, sentences: bool) -> None:
    """Print the warnings of a page and, if asked for, its sentences."""
    for warning in page.warnings:
        warning_line(warning)
    for name, sentence in page.sentences.items() if sentences else ():
        out.print(f"[bold]{escape(name)}[/]: {escape(sentence)}", highlight=False, soft_wrap=True)
