"""``llmpruner plugins``."""

from __future__ import annotations

import typer

from ..plugins.catalog import Catalog
from .console import print_json, table
from .options import Json, catalog_of


def add_commands(app: typer.Typer) -> None:
    app.command(name="plugins")(list_plugins)


def list_plugins(ctx: typer.Context, as_json: Json = False) -> None:
    """List families, criteria, strategies and readers, each with the package it comes from."""
    rows = _rows(catalog_of(ctx))
    broken = [{"plugin": b.name, "package": b.package, "reason": b.reason} for b in catalog_of(ctx).broken]
    if as_json:
        print_json({"plugins": rows, "broken": broken, "blocked": catalog_of(ctx).host.blocked})
        return
    cells = [(r["kind"], r["name"], r["package"], r["summary"]) for r in rows]
    table(None, ("Kind", "Name", "Package", "What it is"), cells, left=4)


def _rows(catalog: Catalog) -> list[dict[str, str]]:
    rows = []
    for registry in (catalog.families, catalog.criteria, catalog.strategies, catalog.readers):
        for name, cls in registry.items():
            summary = getattr(cls, "summary", "") or (cls.__doc__ or "").strip().split("\n")[0]
            variants = getattr(cls, "variants", ())
            summary += f" [variants: {', '.join(variants)}]" if variants else ""
            rows.append(
                {
                    "kind": registry.kind,
                    "name": name,
                    "package": registry.package_of(name),
                    "summary": summary,
                }
            )
    return rows
