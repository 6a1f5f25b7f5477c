"""The calibration source of text in files and data sets. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ModelError
from .documents import check_source, read_documents
from .source import CalibrationSource, SampleTask

if TYPE_CHECKING:
    import torch


class TextSource(CalibrationSource):
    """Windows of the documents in a file or a data set (for their forms see `llmpruner.data.documents`)."""

    name = "text"
    summary = "a .txt, .json, .jsonl or .parquet file, or a data set (name, name:config or name:config:split)"

    def check(self, reference: str) -> None:
        check_source(reference)

    def sample(self, task: SampleTask) -> torch.Tensor:
        """Raises `ModelError` where the model has no tokenizer."""
        if task.tokenizer is None:
            raise ModelError(
                f"the model brings no tokenizer, so it cannot be calibrated on '{task.reference}'; use 'self'"
            )
        from .windows import windows

        return windows(
            read_documents(task.reference), task.tokenizer,
            samples=task.samples, length=task.length, seed=task.seed, source=task.reference,
        )  # fmt: skip
