"""The calibration source of text that the model writes itself. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..component import ComponentSettings
from ..errors import DataError, no_tokenizer
from .source import CalibrationSource, SampleTask

if TYPE_CHECKING:
    import torch


class SelfWritten(CalibrationSource):
    """Text sampled from the model; nothing is read or downloaded. See `calibration.written`, and for conversations
    `llmpruner.calibration.written_chats`.

    Text without conversations has no tokens of a chat format, which every prompt in a chat has, and whose hidden states
    differ from those of words. With ``chats``, a pruned model is nearer to the dense one in chats, and
    further from it on other text.
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
            0.0,
            ge=0,
            le=1,
            description="Share of the samples that are conversations in the model's chat format; it writes the "
            "questions too.",
        )

    settings: Settings

    def check(self, reference: str) -> None:
        if reference:
            raise DataError(f"--calibration self:{reference}: the model writes this text, so nothing follows 'self'")

    def sample(self, task: SampleTask) -> torch.Tensor:
        from .written import self_generated

        own, share = self.settings, self.settings.chats
        wanted = round(task.samples * share)
        if share and not wanted:
            raise DataError(f"self.chats: {share:g} of {task.samples} samples is none; raise it, or --samples")
        # First, as they may be refused, and passages take longer.
        chats = self._chats(task, wanted) if wanted else None
        if chats is not None and wanted == task.samples:
            return chats
        passages = self_generated(
            task.model, task.tokenizer, task.samples - wanted, task.length, task.seed,
            passage=own.passage, batch=own.batch, starts=own.starts, progress=task.progress,
        )  # fmt: skip
        if chats is None:
            return passages
        # Spread evenly, as some components read only the first samples.
        places = [(number + 1) * task.samples // wanted - 1 for number in range(wanted)]
        found = passages.new_empty(task.samples, task.length)
        found[places] = chats
        found[sorted({*range(task.samples)} - {*places})] = passages
        return found

    def _chats(self, task: SampleTask, count: int) -> torch.Tensor:
        """Conversations are longer than passages, so that fewer are written at once."""
        from .written_chats import written_chats

        if task.tokenizer is None or task.family is None:
            raise no_tokenizer("the model", "it cannot write conversations; leave self.chats out")
        return written_chats(
            task.model, task.tokenizer, task.family, count, task.length, task.seed,
            batch=-(-self.settings.batch // 2), progress=task.progress,
        )  # fmt: skip
