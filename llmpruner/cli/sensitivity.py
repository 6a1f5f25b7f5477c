"""``llmpruner sensitivity``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..settings import LoadSettings, SensitivitySettings, settings_from
from .console import RichProgress, note, print_json, table
from .derive import Json, ModelName, catalog_of, takes

if TYPE_CHECKING:
    from ..pruning.allocation.curve import Curve


def add_commands(app: typer.Typer) -> None:
    app.command()(sensitivity)


@takes(settings=SensitivitySettings, options=LoadSettings)
def sensitivity(
    ctx: typer.Context,
    model: ModelName,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .json file to write; the plot is written beside it, as .svg.")
    ],
    settings: dict[str, Any],
    options: dict[str, Any],
    restart: Annotated[bool, typer.Option("--restart", help="Remove the points of an interrupted run.")] = False,
    as_json: Json = False,
) -> None:
    """Measure how much a cut of one layer and kind alone changes the predictions."""
    from .. import api

    curve = api.sensitivity(
        model, output=output, restart=restart, load=settings_from(LoadSettings, options), progress=RichProgress(),
        catalog=catalog_of(ctx), **settings,
    )  # fmt: skip
    if as_json:
        print_json(curve.as_json())
    else:
        _show(curve)
    note(f"written: {output} and {output.with_suffix('.svg')}; prune with --allocation curve --set curve.file={output}")


def _show(curve: Curve) -> None:
    """A table for each kind: a row for each group, a column for each share."""
    for kind in dict.fromkeys(group.kind for group in curve.groups):
        groups = [group for group in curve.groups if group.kind == kind]
        shares = sorted({round(point.removed / group.units, 2) for group in groups for point in group.points})
        rows = []
        for group in groups:
            found = {round(point.removed / group.units, 2): point.divergence for point in group.points}
            cells = ["-" if share not in found else f"{found[share]:.3g}" for share in shares]
            rows.append(("-" if group.layer is None else group.layer, *cells))
        table(f"{kind}: KL divergence per token (nats)", ("layer", *(f"-{share:.0%}" for share in shares)), rows)
