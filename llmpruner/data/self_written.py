"""The calibration source of text that the model writes itself. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

    settings: Settings

    def check(self, reference: str) -> None:
        if reference:
            raise DataError(f"--calibration self:{reference}: the model writes this text, so nothing follows 'self'")

    def sample(self, task: SampleTask) -> torch.Tensor:
        from .written import self_generated

        return self_generated(
            task.model, task.tokenizer, task.samples, task.length, task.seed,
            passage=self.settings.passage, batch=self.settings.batch,
            progress=task.progress,
        )  # fmt: skip
