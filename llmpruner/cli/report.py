"""``llmpruner report``, and the reports that other commands write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..errors import LlmprunerError
from ..settings import PageSettings
from .console import done_line, note, out, print_json, warning_line
from .derive import Json, takes
from .process import is_first

if TYPE_CHECKING:
    from ..plugins.catalog import Catalog

NoReport = Annotated[
    bool, typer.Option("--no-report", help="Write no report.html; `llmpruner report` can do so later.")
]


@takes(PageSettings)
def report(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="Checkpoints of llmpruner, or outputs of recipes; several are compared."
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
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write an HTML page about a pruned model: size, speed and quality next to the dense model, and what was cut.

    The page is one file that loads nothing. `prune`, `run` and `demo` write it too. Reads no weights.
    """
    from .. import api

    catalog, settings = arguments["catalog"], arguments.get("settings")
    made = api.write_report(directories, output, results=results or (), catalog=catalog, settings=settings)
    for warning in made.warnings:
        warning_line(warning)
    if as_json:
        print_json({"output": str(made.path), "models": list(made.facts)})
        return
    for facts in made.facts:
        out.print(f"[bold]{escape(facts['name'])}[/]: {escape(facts['sentence'])}", highlight=False, soft_wrap=True)
    done_line(str(made.path))


def write_next_to(directory: Path, catalog: Catalog, *, say: bool = False) -> None:
    """Write ``report.html`` into a checkpoint or the output of a recipe; a failure is a warning, as the work itself is
    done. ``say``: print the sentence of the page."""
    from .. import api

    if not is_first():
        return
    try:
        made = api.write_report(directory, catalog=catalog)
    except LlmprunerError as error:
        warning_line(f"no report was written: {error}")
        return
    for warning in made.warnings:
        warning_line(warning)
    if say:
        (sentence,) = made.sentences
        out.print(sentence[:1].upper() + sentence[1:], highlight=False, markup=False)
    note(f"report written to {made.path}")
