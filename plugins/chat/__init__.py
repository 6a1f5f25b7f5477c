"""``llmpruner chat``: conversations with one or several models, in the terminal or on a local page."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

import llmpruner
from llmpruner import LlmprunerError, hookimpl


@hookimpl
def llmpruner_commands(app: typer.Typer) -> None:
    app.command()(chat)


Exchange = tuple[str, str]
"""A question and its answer."""


class Chat:
    """A conversation with one model. ``options``: of `llmpruner.generate`."""

    def __init__(self, model: llmpruner.Model, **options: Any) -> None:
        self.name, self.exchanges = model.ref, list[Exchange]()
        self._model, self._options = model, options

    def answer(self, exchanges: Sequence[Exchange], text: str, on_text: Callable[[str], None]) -> None:
        """Answer ``text`` after ``exchanges``, and call ``on_text`` with each piece; an exception in it stops the
        model. Raises `llmpruner.DataError` for a conversation that is longer than the model can read."""
        llmpruner.generate(self._model, text, chat=True, history=exchanges, on_text=on_text, **self._options)

    def ask(self, text: str, on_text: Callable[[str], None]) -> None:
        """`answer`, as the next turn of this conversation; an interrupted answer is part of it, too."""
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        try:
            self.answer(self.exchanges, text, show)
        finally:
            if pieces:
                self.exchanges.append((text, "".join(pieces)))


COMMANDS = "/reset begins anew, /quit leaves, Ctrl-C stops an answer"


def chat(
    ctx: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Directories, hub ids, .gguf files.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token; above, it samples.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same questions: same answers.")] = 0,
    dtype: Annotated[str, typer.Option(help="Weights in memory: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, xpu …")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run a checkpoint's code.")] = False,
    web: Annotated[bool, typer.Option("--web", help="Chat on a page in the browser of this machine.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --web; 0 takes a free one.")] = 0,
) -> None:
    """Chat with one or several models, which answer in turn."""
    load = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "catalog": ctx.obj}
    if web:
        from .web import listen, serve

        listening = listen(port)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    structures = [llmpruner.discover(model, **load) for model in models]  # mistakes are found before weights are read
    chats = [Chat(llmpruner.load(each, **load), **options) for each in structures]
    if web:
        _note(f"http://127.0.0.1:{listening.getsockname()[1]}/ on this machine alone; Ctrl-C ends it")
        serve(chats, listening)
    else:
        _talk(chats)


def _talk(chats: Sequence[Chat]) -> None:
    """Answer what is typed until the end of the input. Raises the error of an answer unless someone types."""
    _note(COMMANDS)
    interactive = sys.stdin.isatty()
    while True:
        try:
            text = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            _note(f"\n{COMMANDS}")
            continue
        if text == "/quit":
            return
        if text == "/reset":
            for each in chats:
                each.exchanges.clear()
        elif text.startswith("/"):
            _note(f"no such command: {text.split()[0]}; {COMMANDS}")
        elif text:
            for each in chats:
                typer.secho(each.name, bold=True)
                try:
                    each.ask(text, _show)
                except KeyboardInterrupt:
                    _show(" […]")
                except LlmprunerError as error:
                    if not interactive:
                        raise
                    _note(f"error: {error}")
                _show("\n")


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _note(text: str) -> None:
    typer.secho(f"• {text}", err=True, dim=True)
