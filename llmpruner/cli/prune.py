"""``llmpruner plan``, ``prune``, ``recover``, ``export`` and ``verify``: making checkpoints, and checking them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import check_new_file
from ..progress import is_first
from ..report.sections import loss_text
from ..settings import ExportSettings, LoadSettings, PruneSettings, RecoverSettings, RunSettings
from ..structure.scope import COUNTED, QUANTISED
from ..values import bytes_text, count_text, counted, names_of
from .console import done_line, error_line, note, print_json, sizes_text, table, warning_line
from .derive import Json, ModelName, Output, takes
from .measure import write_next_to

if TYPE_CHECKING:
    from ..structure.outcome import Outcome
    from ..structure.plan import PruningPlan


@takes(PruneSettings, LoadSettings, RunSettings, omit=("restart",))
def plan(
    model: ModelName,
    arguments: dict[str, Any],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Show the units that would be kept in each layer, without changing the model. The plan can be reviewed and
    replayed."""
    from .. import api

    if output is not None:
        check_new_file(output)
    shared = {name: arguments.pop(name) for name in ("load", "run", "progress", "catalog")}
    pruning_plan, outcome = api.plan_and_outcome(model, arguments, **shared)
    if output is not None and is_first():
        pruning_plan.save(output)
        note(f"plan written to {output}")
    if as_json:
        _print_json(pruning_plan, outcome)
    else:
        show_plan(pruning_plan, outcome)
        file = output or "PLAN (written by -o PLAN)"
        note(f"next: llmpruner prune {model} --plan {file} -o DIR")


@takes(PruneSettings, LoadSettings, RunSettings)
def prune(
    model: ModelName,
    output: Output,
    arguments: dict[str, Any],
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Replay this plan instead of making one; see `llmpruner plan`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove the least important units and write an ordinary Hugging Face directory.

    By default the units are chosen by gradients on text that the model generates, and the weights that consumed
    removed units are fitted again by least squares, without training or a corpus. `--method llm-pruner` is the method
    of LLM-Pruner (Ma, Fang, Wang, NeurIPS 2023).
    """
    from .. import api

    ratio = arguments.get("ratio", "")
    if "," in ratio and not ratio.startswith("0,") and plan_file is None:
        made = api.prune_each(model, ratios=names_of(arguments.pop("ratio")), output=output, **arguments)
        folders = [each.ref for each in made]
        write_next_to(output, arguments, sentences=not as_json, checkpoints=[Path(f) for f in folders])
        if as_json:
            print_json([{"plan": each.plans[-1].model_dump(mode="json"), "output": each.ref} for each in made])
        else:
            done_line(f"{', '.join(folders)} in {arguments['progress'].seconds()} s")
        return
    pruned = api.prune(model, plan=plan_file, output=output, **arguments)
    seconds = arguments["progress"].seconds()
    write_next_to(output, arguments)
    pruning_plan, outcome = pruned.plans[-1], pruned.outcome
    assert outcome is not None
    if as_json:
        _print_json(pruning_plan, outcome, output=str(output), checkpoint=pruned.form, seconds=seconds)
        return
    show_plan(pruning_plan, outcome)
    needs = "and trust_remote_code=True, or llmpruner.load_pruned" if pruned.form == "shim" else "as any model does"
    sizes, quality = sizes_text(output, output), "" if outcome.quality is None else f"{outcome.quality}; "
    done_line(f"{output} in {seconds} s; {sizes}{quality}loads with from_pretrained {needs}")
    note(f"next: llmpruner recover {output} -o {output}-recovered")


def _print_json(plan: PruningPlan, outcome: Outcome, **facts: Any) -> None:
    result = {**outcome.as_json(), **facts}
    print_json({"plan": plan.model_dump(mode="json"), "result": result, "forecast": outcome.forecast})


def show_plan(plan: PruningPlan, outcome: Outcome) -> None:
    """Print the numbers of kept units of each kind and layer, the sizes before and after, and hints."""
    kinds, rows = plan.table()
    table("Units kept", ("Layers", *kinds), rows)
    sizes: dict[str, tuple[str, float, float, Any]] = {
        "decoder": ("Decoder parameters", outcome.decoder_before, outcome.decoder_after, count_text),
        "parameters": ("All parameters", outcome.parameters_before, outcome.parameters_after, count_text),
        "bytes": ("Weights", outcome.bytes_before, outcome.bytes_after, bytes_text),
    }
    if budget := outcome.budget:
        sizes[budget.name] = (budget.label, budget.before, budget.after, count_text)
    rows = [(label, text(x), text(y), f"{1 - y / x:.2%}") for label, x, y, text in sizes.values()]
    table("Result", ("", "Before", "After", "Removed"), rows)
    if outcome.tokens is not None:
        table("Tokens that go", *outcome.tokens.table(), left=2)
    _, before, after, _ = sizes[plan.target.budget]
    for hint in _hints(plan, outcome, removed=1 - after / before):
        note(hint)


def _hints(plan: PruningPlan, outcome: Outcome, removed: float) -> Iterator[str]:
    """What a user may want to change. ``removed``: the share of the budget."""
    if outcome.tokens is not None:
        scripts = [s for s in outcome.tokens.scripts if s.gone > 0.75 * s.tokens and s.script.isupper()]
        if lost := ", ".join(f"{s.script}: {s.gone:,} of {s.tokens:,} tokens go" for s in scripts):
            yield f"{lost}, and their text becomes small pieces; --set vocabulary.scripts=… keeps scripts"
    amount = plan.target.amount
    uniform = plan.selection.shape == "uniform" and any(cut.layer is not None for cut in plan.cuts.values())
    if plan.target.by == "ratio" and f"{amount:.1%}" != f"{removed:.1%}":
        yield f"asked for {amount:.1%}; {'uniform widths' if uniform else 'whole units'} give {removed:.1%}"
    if uniform:
        yield "--shape free costs less quality, but fewer programs load the result"
    # Formats with few bits refuse other widths. Where the dense model has such a width, nothing is lost.
    quantisable = [cut for cut in plan.cuts.values() if cut.kind not in COUNTED and cut.units % QUANTISED == 0]
    if odd := sorted({len(cut.kept) for cut in quantisable if len(cut.kept) % QUANTISED}):
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        wrong = f"widths that are no multiple of {QUANTISED} ({odd[0]:,}{more}) cannot be quantised to 4 bits"
        yield f"{wrong}; --set prune.round_to={QUANTISED}, or a multiple of it, avoids them"


@takes(RecoverSettings, LoadSettings, RunSettings, omit=("max_memory",))
def recover(model: ModelName, output: Output, arguments: dict[str, Any], as_json: Json = False) -> None:
    """Restore quality of a pruned model by a short training: distillation from the dense model, or LoRA.

    After an interruption, the same command resumes: its state is in OUTPUT.recovery until it has finished. Exit code 3
    when no step made the model better, so that the result has the weights of MODEL.
    """
    from .. import api

    recovered = api.recover(model, output=output, **arguments)
    assert recovered.record is not None
    record = recovered.record["recovery"][-1]
    seconds = arguments["progress"].seconds()
    if as_json:
        result = {"model": model, **record, "output": str(output), "checkpoint": recovered.form}
        print_json({**result, "seconds": seconds})
    elif record["improved"] is False:
        warning_line(f"{output}: {loss_text(record)}")
    else:
        steps = counted(len(record["losses"]), "step")
        done_line(f"{output}: {counted(record['examples'], 'example')}, {steps}, {loss_text(record)}, {seconds:.0f} s")
        note(f"next: llmpruner evaluate {model} {output}")
    if record["improved"] is False:
        raise typer.Exit(3)


@takes(LoadSettings, omit=("family", "dtype", "device", "revision"))
def verify(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A checkpoint that prune, recover or export wrote.", exists=True, file_okay=False
        ),
    ],
    arguments: dict[str, Any],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The dense model; by default the one that the record names.")
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
            done_line(f"{directory} is intact")
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
