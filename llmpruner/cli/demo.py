"""``llmpruner demo``: all stages on a real model, without a hub and without a corpus."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..files import check_new_directory
from ..settings import DEMO
from .bench import show_bench
from .console import RichProgress, count, out, table
from .evaluate import show_evaluations
from .options import catalog_of
from .prune import show_plan

if TYPE_CHECKING:
    from ..loading.model import Model

PROMPT = "Give three tips for staying healthy."
SAMPLES = 32
"""Calibration samples: an eighth of the default method's, to save time."""
MEASURE: dict[str, Any] = {"perplexity": "pydoc", "window": 512, "tokens": 10240, "autocast": True}
SPEED: dict[str, Any] = {"batch": 1, "prompt": 256, "rounds": 3}
RECOVERY: dict[str, Any] = {
    "learning_rate": 5e-4,
    "batch_size": 8,
    "micro_batch_size": 8,
    "max_steps": 32,
    "loss_on": "answers",
    "autocast": True,
    "validation": 0,
}
"""Fewer steps with a higher learning rate than the paper's: for two minutes and two hundred examples instead of hours
and fifty thousand. All are trained on, and none are held back for validation. The loss is on answers alone, as in few
steps a model learns to repeat prompts."""


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
) -> None:
    """Prune, recover and compare a real 135M model in minutes, on a CPU, offline.

    Pruned as `llmpruner prune` does by default, on fewer samples. Calibration text is written by the model itself,
    perplexity is measured on Python's own documentation, and the instructions for recovery come with llmpruner.
    """
    from .. import api

    started = time.monotonic()
    check_new_directory(output)
    shared: dict[str, Any] = {"progress": RichProgress(), "catalog": catalog_of(ctx)}
    model = api.load(DEMO, **shared)
    output.mkdir()
    kinds = Counter(group.kind for group in model.graph.groups)
    out.rule("1. Discovery")
    out.print(
        f"{count(model.graph.total_parameters)} parameters, {count(model.graph.decoder_parameters)} in the decoder; "
        "coupled groups: " + ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    )
    measured, answers = {}, {}

    def look(name: str, model: Model) -> None:
        measured[name] = replace(api.evaluate(model, **MEASURE, **shared)[0], name=name)
        answers[name] = api.generate(model, PROMPT, chat=True, max_new_tokens=60, **shared)

    look("dense", model)
    out.rule("2. Pruning and compensation")
    model = api.prune(model, ratio=ratio, samples=SAMPLES, seed=seed, output=output / "pruned", **shared)
    assert model.outcome is not None
    show_plan(model.plans[-1], model.outcome)
    out.print(
        f"The same as: llmpruner prune demo --ratio {ratio:g} --samples {SAMPLES} --seed {seed} -o …", style="dim"
    )
    look("pruned", model)

    out.rule("3. Recovery")
    data = resources.files("llmpruner") / "demo" / "instructions.jsonl"
    with resources.as_file(data) as file:
        model = api.recover(model, data=str(file), output=output / "recovered", **RECOVERY, **shared)
    record = (model.record or {})["recovery"][-1]
    losses = record["losses"]
    out.print(
        f"LoRA on {record['examples']} instructions, {len(losses)} steps: loss on answers {losses[0]:.3f} → "
        f"{losses[-1]:.3f}"
    )
    look("recovered", model)

    out.rule("4. Side by side")
    from ..evaluation.table import Evaluations  # torch stays out of --help

    show_evaluations(Evaluations(measured.values()))
    out.print(
        f"[dim]Perplexity: first {MEASURE['tokens']:,} tokens of Python's help topics, windows of {MEASURE['window']}, "
        "bfloat16 autocast.[/]"
    )
    table(None, ("", f"“{PROMPT}”"), list(answers.items()), left=2)
    # Together, as what else the machine does would show in times that are taken minutes apart.
    del model
    show_bench(api.bench([DEMO, output / "pruned", output / "recovered"], **SPEED, **shared))
    out.print(f"Files: {escape(str(output / 'pruned'))} and {escape(str(output / 'recovered'))}; both load with")
    out.print(f"  llmpruner generate {escape(str(output / 'recovered'))} --chat --prompt …", highlight=False)
    out.print(f"Done in {time.monotonic() - started:.0f} s.")
