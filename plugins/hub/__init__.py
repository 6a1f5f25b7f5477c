"""``llmpruner push``: publish a checkpoint on the Hugging Face Hub, with a model card from its record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmpruner import hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def llmpruner_commands(app: typer.Typer) -> None:
    from .command import push

    app.command()(push)
