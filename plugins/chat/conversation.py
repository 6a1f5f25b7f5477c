"""A conversation with one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llmpruner

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
