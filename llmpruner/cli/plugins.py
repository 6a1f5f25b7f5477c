"""``llmpruner plugins``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from .console import out, print_json, table
from .options import Json, catalog_of

if TYPE_CHECKING:
    from ..plugins.describe import ComponentFacts


def add_commands(app: typer.Typer) -> None:
    app.command(name="plugins")(list_plugins)


def list_plugins(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show one component with its settings.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the components of all plugins with their packages; or show one component with its settings."""
    from ..plugins.describe import describe, summary_of

    catalog = catalog_of(ctx)
    if name is not None:
        _show(describe(catalog, name), as_json=as_json)
        return
    rows = [
        {"kind": registry.kind, "name": key, "package": registry.package_of(key), "summary": summary_of(cls)}
        for registry in catalog.registries
        for key, cls in registry.items()
    ]
    broken = [{"plugin": b.name, **{k: v for k, v in asdict(b).items() if k != "name"}} for b in catalog.broken]
    if as_json:
        print_json({"plugins": rows, "broken": broken, "blocked": catalog.host.blocked})
        return
    table(None, ("Kind", "Name", "Package", "What it is"), [tuple(row.values()) for row in rows], left=4)


def _show(found: Sequence[ComponentFacts], *, as_json: bool) -> None:
    if as_json:
        print_json([asdict(fact) for fact in found])
        return
    for fact in found:
        told = escape(f"{fact.kind} of {fact.package} ({fact.module}): {fact.summary}")
        out.print(f"[bold]{escape(fact.name)}[/], {told}")
        rows = [(f"{fact.name}.{s.key}", f"{s.type} {s.bounds}", s.default, s.description) for s in fact.settings]
        if rows:
            table("Settings, for --set NAME.key=value", ("Setting", "Type", "Default", "What it is"), rows, left=4)
