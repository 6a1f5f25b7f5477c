"""``llmpruner chat``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..errors import LlmprunerError, SettingsError
from ..settings import ChatSettings, LoadSettings, settings_from
from .console import RichProgress, error_line, note, out
from .derive import takes
from .options import ModelNames, catalog_of

if TYPE_CHECKING:
    from ..chatting.chat import Chat

HELP = "/reset begins anew, /quit leaves, Ctrl-C stops an answer"


def add_commands(app: typer.Typer) -> None:
    app.command()(chat)


@takes(settings=ChatSettings, options=LoadSettings)
def chat(
    ctx: typer.Context,
    models: ModelNames,
    settings: dict[str, Any],
    options: dict[str, Any],
    web: Annotated[bool, typer.Option("--web", help="Chat on a page in the browser of this machine.")] = False,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="Port of --web; a free one by default.")
    ] = None,
) -> None:
    """Chat with one or several models, which answer in turn."""
    if port is not None and not web:
        raise SettingsError("--port has no effect without --web; leave it out")
    if web:
        from ..chatting.web import check_web, listen, serve

        check_web()
        where = listen(port or 0)
    from .. import api

    chats = api.chat(
        models, load=settings_from(LoadSettings, options), progress=RichProgress(), catalog=catalog_of(ctx), **settings
    )
    for one in chats:
        if one.plain:
            note(f"'{one.name}' has no chat format: it continues the text")
    if web:
        note(f"http://127.0.0.1:{where.getsockname()[1]}/ on this machine alone; Ctrl-C ends it")
        serve(chats, where)
    elif not _talk(chats) and not sys.stdin.isatty():
        raise typer.Exit(2)


def _talk(chats: Sequence[Chat]) -> bool:
    """Answer what is typed until the end of it; False where an answer failed, which its error said."""
    note(HELP)
    answered = True
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return answered
        except KeyboardInterrupt:
            note(f"\n{HELP}")
            continue
        if text == "/quit":
            return answered
        if text == "/reset":
            for one in chats:
                one.reset()
            note("the conversation begins anew")
        elif text.startswith("/"):
            note(f"no such command: {text.split()[0]}; {HELP}")
        elif text:
            for one in chats:
                answered = _answer(one, text) and answered


def _answer(one: Chat, text: str) -> bool:
    """Print an answer as it comes, until it ends or the user interrupts it; False where it failed."""
    out.print(f"[bold cyan]{escape(one.name)}[/]")
    pieces, answered = one.ask(text), True
    try:
        for piece in pieces:
            out.file.write(piece)
            out.file.flush()
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        out.file.write(" […]")
    except LlmprunerError as error:
        error_line(str(error))
        answered = False
    out.file.write("\n")
    out.file.flush()
    return answered
