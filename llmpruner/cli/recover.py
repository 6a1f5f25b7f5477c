"""``llmpruner recover``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import DataError, UnknownNameError
from ..loading.options import LoadOptions
from ..settings import RecoverSettings
from .console import RichProgress, note, out, print_json
from .evaluate import Autocast
from .options import Json, Model, Output, Seed, catalog_of, load_options, new_directory, open_model, spliced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..loading.model import LoadedModel
    from ..recovery.base import RecoveryStrategy
    from ..recovery.run import RecoveryResult

DEFAULTS = RecoverSettings(data="")
LOSSES = ("all", "answers")
OF_STRATEGY = {"rank", "alpha", "dropout"}


def add_commands(app: typer.Typer) -> None:
    app.command()(recover)


def recovery_settings(
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA adapters.")] = None,
    alpha: Annotated[int | None, typer.Option(help="Scale of the adapters: α / rank.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout before the adapters.")] = None,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.")] = DEFAULTS.learning_rate,
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the data.")] = DEFAULTS.epochs,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many optimizer steps.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per optimizer step.")] = DEFAULTS.batch_size,
    micro_batch_size: Annotated[
        int,
        typer.Option(min=1, help="Examples in memory at once; gradients accumulate up to the batch size."),
    ] = DEFAULTS.micro_batch_size,
    cutoff: Annotated[int, typer.Option(min=2, help="Tokens per example; longer ones are cut.")] = DEFAULTS.cutoff,
    loss_on: Annotated[
        str, typer.Option(help="all: the whole text, as the paper; answers: the answers alone.")
    ] = DEFAULTS.loss_on,
    autocast: Autocast = False,
    seed: Seed = 0,
) -> RecoverSettings:
    """The training settings; the defaults are the paper's."""
    if loss_on not in LOSSES:
        raise UnknownNameError("loss", loss_on, LOSSES)
    where: Literal["all", "answers"] = "answers" if loss_on == "answers" else "all"
    return RecoverSettings(
        data="", rank=rank, alpha=alpha, dropout=dropout, learning_rate=learning_rate, epochs=epochs,
        max_steps=max_steps, batch_size=batch_size, micro_batch_size=micro_batch_size, cutoff=cutoff, loss_on=where,
        autocast=autocast, seed=seed,
    )  # fmt: skip


@spliced(settings=recovery_settings, options=load_options)
def recover(
    ctx: typer.Context,
    model: Model,
    output: Output,
    data: Annotated[
        str,
        typer.Option(
            help="Alpaca-style .json or .jsonl (instruction, input, output; or text), or the name of a data set."
        ),
    ],
    settings: RecoverSettings,
    options: LoadOptions,
    strategy: Annotated[str, typer.Option(help="Recovery strategy; see `llmpruner plugins`.")] = "lora",
    limit: Annotated[int | None, typer.Option(min=1, help="Use so many examples, drawn by the seed.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge/--no-merge", help="Add the adapters to the weights, or save them alone.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Give quality back to a pruned model by a short training (LoRA, as in LLM-Pruner).

    Interrupted, the same command goes on where it stopped: its state is kept in OUTPUT.recovery until it is done.
    """
    settings = settings.model_copy(update={"data": data, "strategy": strategy, "limit": limit, "merge": merge})
    chosen = catalog_of(ctx).strategies[strategy](**settings.model_dump(include=OF_STRATEGY, exclude_none=True))
    new_directory(output)
    loaded = open_model(ctx, model, options)
    from ..loading.dense import load_dense

    if loaded.tokenizer is None:
        raise DataError(f"model '{model}' brings no tokenizer, so it cannot be trained on text")
    work_dir = output.with_name(output.name + ".recovery")
    result = run_recovery(loaded, chosen, settings, work_dir, lambda: load_dense(loaded, catalog_of(ctx), options))
    kind = save_recovered(loaded, result, output)
    shutil.rmtree(work_dir)
    if as_json:
        said = {"model": model, **result.record(), "output": str(output), "checkpoint": kind}
        print_json({**said, "seconds": round(result.seconds, 1)})
        return
    losses = f"loss {result.losses[0]:.3f} → {result.losses[-1]:.3f}, " if result.losses else ""
    out.print(
        f"[bold green]✓[/] {output}: {result.examples} examples, {len(result.losses)} steps, {losses}"
        f"{result.seconds:.0f} s"
    )


def run_recovery(
    loaded: LoadedModel,
    strategy: RecoveryStrategy,
    settings: RecoverSettings,
    work_dir: Path,
    load_teacher: Callable[[], PreTrainedModel] | None = None,
) -> RecoveryResult:
    """Train with a progress bar; the loaded model's weights change."""
    from ..recovery import run

    with RichProgress().counter("Recovering") as step:
        result = run.recover(
            loaded.model, loaded.tokenizer, loaded.graph, loaded.family, strategy, settings, work_dir,
            load_teacher=load_teacher, on_step=step,
        )  # fmt: skip
    for remark in result.notes:
        note(remark)
    return result


def save_recovered(loaded: LoadedModel, result: RecoveryResult, output: Path) -> str:
    """A whole model where adapters are merged, the adapters alone where not. Returns ``stock``, ``shim`` (as
    `pipeline.save` does) or ``adapter``."""
    from ..checkpoints.adapters import save_adapter
    from ..recipes.pipeline import save

    if hasattr(result.model, "peft_config"):
        save_adapter(result.model, output, base=loaded.ref, tokenizer=loaded.tokenizer)
        return "adapter"
    history = [*((loaded.record or {}).get("recovery", [])), result.record()]
    return save(replace(loaded, model=result.model), output, notes={"recovery": history})
