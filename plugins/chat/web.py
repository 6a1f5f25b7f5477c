"""A page for chats, served to this machine alone.

Any page in the user's browser can send requests to a loopback address, and a name that an attacker controls can be made
to resolve to it (DNS rebinding). Requests are therefore refused unless ``Host`` names the loopback address, and
questions must be JSON: a browser asks this server whether a foreign page may send that, and it does not allow it.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Queue
from threading import Event, Lock, Thread

from pydantic import BaseModel, ConfigDict, Field

from llmpruner import LlmprunerError, MissingExtraError, SettingsError

from . import Chat, Exchange

try:
    import uvicorn
    from anyio import CancelScope
    from starlette.applications import Starlette
    from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise MissingExtraError("starlette or uvicorn", "chat") from error

_HOST = "127.0.0.1"


class Question(BaseModel):
    """What the page sends: ``model``: number of the model, from 0; ``exchanges``: the conversation so far."""

    model_config = ConfigDict(extra="forbid")

    model: int = Field(ge=0)
    exchanges: list[tuple[str, str]]
    text: str = Field(min_length=1)


def listen(port: int) -> socket.socket:
    """A socket on the loopback address; ``port`` 0 takes a free one. Raises `SettingsError` for one that is in use."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((_HOST, port))
    except OSError as error:
        listening.close()
        raise SettingsError(f"--port {port} cannot be used: {error.strerror or error}; choose another") from error
    return listening


def serve(chats: Sequence[Chat], listening: socket.socket) -> None:
    """Answer requests until the process is interrupted."""
    config = uvicorn.Config(chat_app(chats), log_level="warning", timeout_graceful_shutdown=2)
    # uvicorn ends by the interrupt, and raises it again.
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def chat_app(chats: Sequence[Chat]) -> Starlette:
    """The ASGI application."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # Models share the random state of the process, so one answers at a time.
    turn = Lock()

    async def show(_: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        allowed = f"'nonce-{nonce}'"
        sources = f"script-src {allowed}; style-src {allowed}; connect-src 'self'; img-src data:"
        policy = f"default-src 'none'; {sources}; base-uri 'none'"
        headers = {
            "Content-Security-Policy": f"{policy}; form-action 'none'; frame-ancestors 'none'",
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }
        return HTMLResponse(page.replace("{{ nonce }}", nonce), headers=headers)

    async def models(_: Request) -> Response:
        return JSONResponse([{"name": chat.name} for chat in chats])

    async def answer(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return PlainTextResponse("a question must be JSON", 415)
        try:
            question = Question.model_validate_json(await request.body())
            chat = chats[question.model]
        except (ValueError, IndexError):
            return PlainTextResponse("no such question", 400)
        pieces = _pieces(chat, question.exchanges, question.text, turn)
        try:
            # A conversation that is too long is refused before the first piece.
            first = await run_in_threadpool(next, pieces, "")
        except LlmprunerError as error:
            return PlainTextResponse(str(error), 400)

        async def body() -> AsyncIterator[str]:
            try:
                yield first
                async for piece in iterate_in_threadpool(pieces):
                    yield piece
                    if await request.is_disconnected():
                        return
            finally:
                # The reader has gone, or all is said: the model stops, and the next may begin.
                with CancelScope(shield=True):
                    await run_in_threadpool(pieces.close)

        return StreamingResponse(body(), media_type="text/plain; charset=utf-8", headers={"Cache-Control": "no-store"})

    routes = [Route("/", show), Route("/models", models), Route("/answer", answer, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[_HOST, "localhost"])])


class _Stopped(Exception):
    """The reader has gone."""


def _pieces(chat: Chat, exchanges: Sequence[Exchange], text: str, turn: Lock) -> Generator[str, None, None]:
    """The pieces of an answer as they come. Closing the iterator stops the model. Raises what the model raises."""
    pieces: Queue[str | BaseException | None] = Queue()
    stop = Event()

    def put(piece: str) -> None:
        if stop.is_set():
            raise _Stopped
        pieces.put(piece)

    def work() -> None:
        try:
            with turn:
                chat.answer(exchanges, text, put)
        except BaseException as error:
            pieces.put(error)
        pieces.put(None)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        stop.set()
        thread.join()
