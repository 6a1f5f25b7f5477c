"""A conversation with one model, whose answers come piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from ..calibration.chat import Prompt, conversation_prompt
from ..errors import DataError
from ..models.generation import generate_ids
from ..models.positions import positions_of
from ..models.tokens import ids_to_continue

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..models.family import ModelFamily

Exchange = tuple[str, str]
"""What was asked, and the answer."""


class Chat:
    """A conversation. ``exchanges``: the turns so far. ``plain``: whether the model has no chat format, so that it
    continues the text of all turns instead of answering."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: Any,
        family: ModelFamily,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.name, self.exchanges = name, list[Exchange]()
        self._model, self._tokenizer, self._family = model, tokenizer, family
        self._most, self._temperature, self._seed = max_new_tokens, temperature, seed

    @property
    def plain(self) -> bool:
        return conversation_prompt(self._family, self._tokenizer, (), "?") is None

    def ask(self, text: str) -> Iterator[str]:
        """The pieces of the answer to ``text``, as they come. The answer, or as much of it as came before the iterator
        was closed, is part of the conversation then. Raises `DataError` for a conversation that the model cannot read
        whole."""
        answer = ""
        pieces = self.answer(self.exchanges, text)
        try:
            for piece in pieces:
                answer += piece
                yield piece
        finally:
            # What an interrupted answer has so far is kept: the reader saw it.
            pieces.close()  # type: ignore[attr-defined]
            if answer:
                self.exchanges.append((text, answer))

    def reset(self) -> None:
        """Begin anew."""
        self.exchanges.clear()

    def answer(self, exchanges: Sequence[Exchange], text: str) -> Iterator[str]:
        """As `ask`, for a conversation that the caller keeps. Closing the iterator stops the model."""
        prompt = self._prompt(exchanges, text)
        return self._pieces(prompt, self._room(prompt))

    def _prompt(self, exchanges: Sequence[Exchange], text: str) -> Prompt:
        found = conversation_prompt(self._family, self._tokenizer, exchanges, text)
        if found is not None:
            return found
        return Prompt("\n".join([*(asked + answered for asked, answered in exchanges), text]), False)

    def _room(self, prompt: Prompt) -> int:
        """How many tokens the answer may have."""
        ids = ids_to_continue(self._tokenizer, prompt.text, special=not prompt.has_special_tokens)
        limit = positions_of(self._model.config)
        room = self._most if limit is None else min(self._most, limit - len(ids))
        if room < 1:
            raise DataError(
                f"the conversation has {len(ids):,} tokens and {self.name} reads {limit:,} with its answer; "
                "shorten the message, or begin anew"
            )
        return room

    def _pieces(self, prompt: Prompt, room: int) -> Iterator[str]:
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failed = Event(), list[BaseException]()

        def work() -> None:
            try:
                generate_ids(
                    self._model, self._tokenizer, prompt.text,
                    add_special_tokens=not prompt.has_special_tokens, max_new_tokens=room,
                    temperature=self._temperature, seed=self._seed, stop_text=self._family.stop_text,
                    streamer=streamer, stopping_criteria=StoppingCriteriaList([_until(stop)]),
                )  # fmt: skip
            except BaseException as error:
                failed.append(error)
            finally:
                streamer.text_queue.put(streamer.stop_signal)

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from before_text((piece for piece in streamer if piece), self._family.stop_text)
        finally:
            stop.set()
            thread.join()
        if failed:
            raise failed[0]


def before_text(pieces: Iterator[str], stop: str | None) -> Iterator[str]:
    """The pieces of a text up to ``stop``. What may be the beginning of ``stop`` is held back until more has come."""
    if not stop:
        yield from pieces
        return
    held = ""
    for piece in pieces:
        before, found, _ = (held + piece).partition(stop)
        most = 0 if found else min(len(stop) - 1, len(before))
        kept = next((size for size in range(most, 0, -1) if before.endswith(stop[:size])), 0)
        held = before[len(before) - kept :]
        if len(before) > kept:
            yield before[: len(before) - kept]
        if found:
            return
    if held:
        yield held


def _until(stop: Event) -> Any:
    """A criterion of transformers that ends a generation once ``stop`` is set."""
    import torch
    from transformers import StoppingCriteria

    class Until(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), stop.is_set(), dtype=torch.bool, device=input_ids.device)

    return Until()
