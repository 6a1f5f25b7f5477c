"""``llmpruner recover``."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from ..report.history import loss_text, no_better
from ..settings import LoadSettings, RecoverSettings
from ..values import counted
from .console import done_line, print_json, warning_line
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

    After an interruption, the same command resumes: its state is in OUTPUT.recovery until it has finished.
    """
    from .. import api

    started = time.monotonic()
    recovered = api.recover(model, output=output, restart=restart, **arguments)
    record = recovered.record["recovery"][-1] if recovered.record else {}
    seconds = round(time.monotonic() - started, 1)
    if as_json:
        result = {"model": model, **record, "output": str(output), "checkpoint": recovered.form}
        print_json({**result, "seconds": seconds})
        return
    failed = no_better(record)
    if failed is not None:
        warning_line(f"{output}: {failed}")
        return
    losses = f"{text}, " if (text := loss_text(record)) else ""
    steps = counted(len(record["losses"]), "step")
    done_line(f"{output}: {counted(record['examples'], 'example')}, {steps}, {losses}{seconds:.0f} s")
