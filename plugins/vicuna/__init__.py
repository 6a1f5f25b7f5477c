"""Vicuna: LLaMA with a conversation format, and delta weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmpruner import hookimpl

from .family import VicunaFamily, VicunaV0Family

__all__ = ["VicunaFamily", "VicunaV0Family"]


@hookimpl
def llmpruner_model_families() -> list[type]:
    return [VicunaFamily, VicunaV0Family]


@hookimpl
def llmpruner_commands(app: typer.Typer) -> None:
    app.command("apply-delta")(apply_delta)


def apply_delta(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="LLaMA, in Hugging Face's or Meta's format.")],
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="Official delta weights of Vicuna v0 or v1.1.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write; must not exist.")],
) -> None:
    """Add Vicuna's delta weights to LLaMA."""
    from . import delta as weights

    weights.apply_delta(base, delta, output)
    typer.echo(f"wrote {output}")
