"""``llmpruner recover``."""

from __future__ import annotations

import time
from typing import Any

import typer

from ..recovery.losses import loss_text
from ..settings import LoadSettings, RecoverSettings, RunSettings, settings_from
from ..values import counted
from .console import RichProgress, done_line, print_json
from .derive import Json, ModelName, Output, catalog_of, takes


def add_commands(app: typer.Typer) -> None:
    app.command()(recover)


@takes(settings=RecoverSettings, options=LoadSettings, run=RunSettings)
def recover(
    ctx: typer.Context,
    model: ModelName,
    output: Output,
    settings: dict[str, Any],
    options: dict[str, Any],
    run: dict[str, Any],
    as_json: Json = False,
) -> None:
    """Restore quality of a pruned model by a short training: distillation from the dense model, or LoRA.

    After an interruption, the same command resumes: its state is in OUTPUT.recovery until it has finished.
    """
    from .. import api

    started = time.monotonic()
    recovered = api.recover(
        model, output=output, load=settings_from(LoadSettings, options), run=settings_from(RunSettings, run),
        progress=RichProgress(), catalog=catalog_of(ctx), **settings,
    )  # fmt: skip
    record = recovered.record["recovery"][-1] if recovered.record else {}
    seconds = round(time.monotonic() - started, 1)
    if as_json:
        result = {"model": model, **record, "output": str(output), "checkpoint": recovered.form}
        print_json({**result, "seconds": seconds})
        return
    curve = record["losses"]
    losses = f"{text}, " if (text := loss_text(record)) else ""
    checked = record["validation"]
    if checked:
        best = min(checked, key=lambda one: float(one["loss"]))
        losses += f"validation loss {checked[0]['loss']:.3f} → {best['loss']:.3f}, "
    done_line(
        f"{output}: {counted(record['examples'], 'example')}, {counted(len(curve), 'step')}, {losses}{seconds:.0f} s"
    )
