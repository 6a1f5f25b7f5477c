"""``llmpruner run``, ``llmpruner recipes``, and ``llmpruner demo``: the recipe ``demo``, all stages on a real model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SettingsError
from ..recipes import NamedRecipe
from ..settings import LoadSettings, RunSettings
from ..values import counted
from .console import done_line, out, print_json, table, warning_line
from .derive import Json, takes
from .measure import show_bench, show_evaluations, write_next_to
from .prune import show_plan

if TYPE_CHECKING:
    from ..recipes.run import StepResult


@takes(LoadSettings, RunSettings)
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a name that `llmpruner recipes` lists.")],
    arguments: dict[str, Any],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The dense model; by default the one that the recipe names.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for all results; by default the one that the recipe names."),
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="STEP.key=value",
            help="Another setting in the recipe: STEP is a command (all its steps), or the name or number of a step. "
            "Repeatable.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Do the steps of a recipe: prune, recover, evaluate, export … in one command that can be interrupted.

    Each step has a folder in the output. The same command again skips what is done, goes on where it was
    interrupted, and does again what has changed, with all that depends on it.
    """
    from .. import api

    started = time.monotonic()
    on_step, changes = None if as_json else show_step, values_of(values or [])
    result = api.run_recipe(recipe, model=model, output=output, values=changes, on_step=on_step, **arguments)
    seconds = round(time.monotonic() - started, 1)
    # Not of the folder, in which a longer recipe may have left its own.
    if made := [step.directory for step in result.steps if step.command in ("prune", "recover")]:
        write_next_to(result.output, arguments, checkpoints=made[-1:])
    if as_json:
        print_json({**result.as_json(), "seconds": seconds})
        return
    skipped = sum(step.skipped for step in result.steps)
    done = counted(len(result.steps), "step") + (f", {skipped} of them done before" if skipped else "")
    done_line(f"{result.output}: {done}; {seconds:.0f} s")


def values_of(texts: Sequence[str]) -> dict[str, Any]:
    """``{"prune.ratio": 0.3}`` of ``["prune.ratio=0.3"]``; values are read as YAML. Raises `SettingsError`."""
    import yaml  # `--help` does without it

    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise SettingsError(f"--set {text}: expected STEP.setting=value, such as prune.ratio=0.3")
        try:
            values[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            values[key] = value
    return values


@takes()
def recipes(
    arguments: dict[str, Any],
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print the text of one, to copy and change.")
    ] = None,
) -> None:
    """List the recipes of llmpruner and of plugins, for `llmpruner run`; or print one."""
    known = arguments["catalog"][NamedRecipe]
    if name is None:
        rows = [(key, known.package_of(key), cls.summary) for key, cls in known.items()]
        table(None, ("Name", "Package", "What it does"), rows, left=3)
    else:
        typer.echo(known[name]().text().rstrip("\n"))


def show_step(step: StepResult) -> None:
    """Print the results of a step that was done in this run."""
    if step.skipped:
        return
    result, details = step.result, list[str]()
    if step.command == "recover":
        details = [counted(result["examples"], "example"), counted(result["steps"], "step"), result["loss"]]
    elif step.command == "generate":
        table(None, ("", f"“{result[0]['prompt']}”"), [(answer["name"], answer["text"]) for answer in result], left=2)
    elif step.value is None:
        pass  # an earlier run finished it, and was killed before it was shown
    elif step.command == "prune":
        show_plan(*step.value)
        details = [f"{result['checkpoint']} checkpoint"]
    elif step.command == "evaluate":
        show_evaluations(step.value)
    elif step.command == "bench":
        show_bench(step.value)
    elif step.command == "export":
        details = [step.value]
    line = f"{step.directory}: {', '.join([*details, f'{step.seconds:.0f} s'])}"
    if step.command == "recover" and result["improved"] is False:
        warning_line(line)
    else:
        done_line(line)


@takes()
def demo(
    arguments: dict[str, Any],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all results.")] = Path("demo-output"),
    ratio: Annotated[
        float, typer.Option(min=0.01, max=0.5, help="Share of the decoder's parameters to remove.")
    ] = 0.08,
    seed: Annotated[int, typer.Option(help="Same seed, same inputs: same result.")] = 0,
) -> None:
    """Prune, recover and compare a real 135M model in minutes, on a CPU, offline.

    Fewer tokens, then narrower MLPs as by default, on fewer samples, then distillation from the dense model. Text for
    them is written by the model itself, but for some instructions that come with llmpruner; perplexity is measured on
    Python's own documentation. `llmpruner recipes demo` shows the settings. After an interruption, the same command
    goes on.
    """
    from .. import api

    started = time.monotonic()
    values = {"pruned.ratio": ratio, "prune.seed": seed}
    api.run_recipe("demo", output=output, values=values, on_step=show_step, **arguments)
    write_next_to(output, arguments, sentences=True)
    out.print("Next, with a model of your own:")
    out.print("  llmpruner prune MODEL --ratio 0.2 -o pruned", highlight=False)
    out.print("  llmpruner recover pruned -o recovered", highlight=False)
    out.print(f"Done in {time.monotonic() - started:.0f} s.")
