"""The calibration source of text that the model writes itself. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..component import ComponentSettings
from ..errors import DataError
from .source import CalibrationSource, SampleTask

if TYPE_CHECKING:
    import torch


class SelfWritten(CalibrationSource):
    """Text sampled from the model; nothing is read or downloaded. See `llmpruner.data.written`."""

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

    settings: Settings

    def check(self, reference: str) -> None:
        if reference:
            raise DataError(f"--calibration self:{reference}: the model writes this text, so nothing follows 'self'")

    def sample(self, task: SampleTask) -> torch.Tensor:
        from .written import self_generated

        return self_generated(
            task.model, task.tokenizer, task.samples, task.length, task.seed,
            passage=self.settings.passage, batch=self.settings.batch, starts=self.settings.starts,
            progress=task.progress,
        )  # fmt: skip
