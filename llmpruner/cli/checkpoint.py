"""``llmpruner recover``, ``verify`` and ``export``: what takes a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..report.history import loss_text, no_better
from ..settings import ExportSettings, LoadSettings, RecoverSettings
from ..values import counted
from .console import done_line, error_line, note, print_json, sizes_text, table, warning_line
from .derive import Json, ModelName, Output, takes

Restart = Annotated[bool, typer.Option("--restart", help="Start anew instead of resuming an interrupted run.")]


@takes(RecoverSettings, LoadSettings)
def recover(
    model: ModelName,
    output: Output,
    arguments: dict[str, Any],
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """Restore quality of a pruned model by a short training: distillation from the dense model, or LoRA.

    After an interruption, the same command resumes: its state is in OUTPUT.recovery until it has finished. Exit code 3
    when no step made the model better, so that the result has the weights of MODEL.
    """
    from .. import api

    started = time.monotonic()
    recovered = api.recover(model, output=output, restart=restart, **arguments)
    assert recovered.record is not None
    record = recovered.record["recovery"][-1]
    seconds = round(time.monotonic() - started, 1)
    if as_json:
        result = {"model": model, **record, "output": str(output), "checkpoint": recovered.form}
        print_json({**result, "seconds": seconds})
    elif failed := no_better(record):
        warning_line(f"{output}: {failed}")
    else:
        losses = f"{text}, " if (text := loss_text(record)) else ""
        steps = counted(len(record["losses"]), "step")
        done_line(f"{output}: {counted(record['examples'], 'example')}, {steps}, {losses}{seconds:.0f} s")
        note(f"next: llmpruner evaluate {model} {output}")
    if record.get("improved") is False:
        raise typer.Exit(3)


@takes(LoadSettings, omit=("family", "dtype", "device", "revision"))
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that prune, recover or export wrote.")],
    arguments: dict[str, Any],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="The dense model; by default the one that the record names."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a checkpoint: its files against the hashes in its record, shapes, and its weights against the dense model.

    Exit code 1 when something is damaged, with a line that names the file and the tensor. Reads one layer at a time.
    """
    from .. import api

    result = api.verify_checkpoint(directory, base=base, **arguments)
    if as_json:
        print_json(result.as_json())
    else:
        rows = [(check.name, check.state, check.detail) for check in result.checks]
        table(None, ("Check", "Result", ""), rows, left=3)
        if not result.damage:
            done_line(f"{directory} is whole")
    for line in result.damage:
        error_line(line)
    if result.damage:
        raise typer.Exit(1)


@takes(ExportSettings, LoadSettings)
def export(model: ModelName, output: Output, arguments: dict[str, Any]) -> None:
    """Write a model in the format of another runtime, and verify it."""
    from .. import api

    line = api.export(model, output=output, **arguments)
    done_line(f"{output}: {sizes_text(output, model)}{line}")
