"""``llmpruner chat``: conversations with one or several models, in the terminal or on a local page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmpruner import hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def llmpruner_commands(app: typer.Typer) -> None:
    from .terminal import chat

    app.command()(chat)
