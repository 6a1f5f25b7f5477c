"""The calibration source of text that the model writes itself. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..component import ComponentSettings
from ..data.source import CalibrationSource, SampleTask
from ..errors import DataError

if TYPE_CHECKING:
    import torch


class SelfWritten(CalibrationSource):
    """Text sampled from the model; nothing is read or downloaded. See `llmpruner.data.written`, and for conversations
    `llmpruner.families.written_chats`.

    A text without a chat format tells nothing of the tokens of that format, whose hidden states differ from those of
    words, and a model that is used in chats meets them in every prompt.
    """

    name = "self"
    summary = "text that the model writes itself; nothing is downloaded"
    writes = True

    class Settings(ComponentSettings):
        passage: int = Field(
            64, ge=2, le=16384, description="Maximum tokens per generated passage; samples are made of passages."
        )
        batch: int = Field(64, ge=1, description="Passages that are generated at once; memory grows with it.")
        starts: Literal["texts", "bos"] = Field(
            "texts",
            description="What samples begin with. texts: what the tokenizer puts before a text; where that is nothing, "
            "BOS in every second sample and the middle of a passage in the others. bos: BOS in each.",
        )
        chats: float = Field(
            0.125,
            ge=0,
            le=1,
            description="Share of the samples that are conversations, of a model that has a chat format; it writes the "
            "questions too. Samples that are too short for the format are all passages.",
        )

    settings: Settings

    def check(self, reference: str) -> None:
        if reference:
            raise DataError(f"--calibration self:{reference}: the model writes this text, so nothing follows 'self'")

    def sample(self, task: SampleTask) -> torch.Tensor:
        import torch

        from ..data.written import self_generated

        own = self.settings
        chats = self._chats(task, int(task.samples * own.chats))
        count = task.samples - (0 if chats is None else len(chats))
        if chats is not None and not count:
            return chats
        passages = self_generated(
            task.model, task.tokenizer, count, task.length, task.seed,
            passage=own.passage, batch=own.batch, starts=own.starts, progress=task.progress,
        )  # fmt: skip
        if chats is None:
            return passages
        # Spread evenly, as some components read only the first samples.
        places = [(number + 1) * task.samples // len(chats) - 1 for number in range(len(chats))]
        found = passages.new_empty(task.samples, task.length)
        is_chat = torch.zeros(task.samples, dtype=torch.bool)
        is_chat[places] = True
        found[is_chat], found[~is_chat] = chats, passages
        return found

    def _chats(self, task: SampleTask, count: int) -> torch.Tensor | None:
        if not count or task.tokenizer is None or task.family is None:
            return None
        from .written_chats import written_chats

        return written_chats(
            task.model, task.tokenizer, task.family, count, task.length, task.seed,
            batch=self.settings.batch, progress=task.progress,
        )  # fmt: skip
