"""``llmpruner demo``: the whole story on a real model, without a hub and without a corpus."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.markup import escape

from ..evaluation.report import Evaluation
from ..loading.options import DEMO, LoadOptions
from ..settings import RecoverSettings
from .console import RichProgress, count, out, table
from .evaluate import show_evaluations
from .options import Seed, catalog_of, new_directory, open_model
from .prune import Choice, choice, plan_result, show_plan
from .recover import run_recovery, save_recovered

if TYPE_CHECKING:
    from ..evaluation.report import Evaluation
    from ..loading.model import LoadedModel

PROMPT = "Give three tips for staying healthy."
WINDOW, TOKENS = 512, 10240
SAMPLES = 32
"""Of calibration text: a quarter of what the default method takes, for the demo has minutes."""
RECOVERY = RecoverSettings(
    data="instructions.jsonl",
    learning_rate=5e-4,
    batch_size=8,
    micro_batch_size=8,
    max_steps=32,
    loss_on="answers",
    autocast=True,
)
"""Fewer and bolder steps than the paper's: the demo has two minutes and two hundred examples, not hours and fifty
thousand. On answers alone, since in so few steps a model learns to repeat the prompts; and no bolder, since a repaired
model has little to win and can forget."""


def add_commands(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    ctx: typer.Context,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Directory for the pruned and the recovered model; must not exist."),
    ] = Path("demo-output"),
    ratio: Annotated[float, typer.Option(min=0.01, max=0.5, help="Share of the decoder's parameters to remove.")] = 0.2,
    seed: Seed = 0,
) -> None:
    """Prune, recover and compare a real 135M model in minutes, on a CPU, offline.

    Pruned as `llmpruner prune` does by default, on fewer samples. Calibration text is written by the model itself,
    perplexity is measured on Python's own documentation, and the instructions for recovery come with llmpruner.
    """
    from ..recipes.pipeline import apply_draft, calibrate, draft_plan, save

    started = time.monotonic()
    new_directory(output)
    chosen = cast(Choice, choice(ctx, ratio=ratio, samples=SAMPLES, seed=seed))
    loaded = open_model(ctx, DEMO, LoadOptions())
    output.mkdir()
    kinds = Counter(group.kind for group in loaded.graph.groups)
    out.rule("1. Discovery")
    out.print(
        f"{count(loaded.graph.total_parameters)} parameters, {count(loaded.graph.decoder_parameters)} in the decoder; "
        "coupled groups: " + ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    )
    rows = [_measure("dense", loaded)]
    answers = {"dense": _answer(loaded)}

    out.rule("2. Pruning and repair")
    progress, settings = RichProgress(), chosen.settings(loaded)
    calibration = calibrate(loaded, chosen.criterion, settings, progress)
    draft = draft_plan(loaded, chosen.criterion, settings, progress, calibration)
    sizes = plan_result(loaded, draft.plan)
    pruned = apply_draft(loaded, draft, progress)
    show_plan(loaded.graph, pruned.plans[-1], sizes)
    save(pruned, output / "pruned")
    out.print(
        f"The same as: llmpruner prune demo --ratio {ratio:g} --samples {SAMPLES} --seed {seed} -o …", style="dim"
    )
    rows.append(_measure("pruned", pruned))
    answers["pruned"] = _answer(pruned)

    out.rule("3. Recovery")
    strategy = catalog_of(ctx).strategies["lora"]()
    data = resources.files("llmpruner") / "demo" / "instructions.jsonl"
    with resources.as_file(data) as file:
        training = RECOVERY.model_copy(update={"data": str(file)})
        result = run_recovery(pruned, strategy, training, output / "recovery")
    save_recovered(pruned, result, output / "recovered")
    shutil.rmtree(output / "recovery")
    out.print(
        f"LoRA on {result.examples} instructions, {len(result.losses)} steps in {result.seconds:.0f} s: "
        f"loss on answers {result.losses[0]:.3f} → {result.losses[-1]:.3f}"
    )
    recovered = replace(pruned, model=result.model)
    rows.append(_measure("recovered", recovered))
    answers["recovered"] = _answer(recovered)

    out.rule("4. Side by side")
    show_evaluations(rows)
    out.print(
        f"[dim]Perplexity: first {TOKENS:,} tokens of Python's help topics, windows of {WINDOW}, bfloat16 autocast. "
        "Speed: batch 1, 256 tokens read, 32 written, medians of 3 runs.[/]"
    )
    table(None, ("", f"“{PROMPT}”"), list(answers.items()), left=2)
    out.print(f"Files: {escape(str(output / 'pruned'))} and {escape(str(output / 'recovered'))}; both load with")
    out.print(f"  llmpruner generate {escape(str(output / 'recovered'))} --chat --prompt …", highlight=False)
    out.print(f"Done in {time.monotonic() - started:.0f} s.")


def _measure(name: str, loaded: LoadedModel) -> Evaluation:
    from ..evaluation import cost
    from ..evaluation.perplexity import PYDOC, perplexity, read_text

    progress = RichProgress()
    text = read_text(PYDOC)
    found = perplexity(
        loaded.model, loaded.tokenizer, text, window=WINDOW, tokens=TOKENS, autocast=True, progress=progress
    )
    # What training left behind in this process is not the model's.
    speed = replace(cost.speed(loaded.model, runs=3, progress=progress), peak_bytes=None)
    return Evaluation(name, cost.size(loaded.model, loaded.graph), found, speed=speed)


def _answer(loaded: LoadedModel) -> str:
    from ..families.chat import chat_prompt
    from ..models.generation import generate

    asked = chat_prompt(loaded.family, loaded.tokenizer, PROMPT)
    special = not asked.has_special_tokens
    return generate(loaded.model, loaded.tokenizer, asked.text, add_special_tokens=special, max_new_tokens=60)
