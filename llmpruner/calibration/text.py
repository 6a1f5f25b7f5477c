"""The calibration source of text in files and data sets. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ..component import ComponentSettings
from ..errors import DataError, no_tokenizer
from .documents import check_source, most_characters, read_documents
from .source import CalibrationSource, SampleTask

if TYPE_CHECKING:
    import torch

_MANY = 10_000
"""Samples from which on their number alone is compared with the size of a file. A file that is too short for fewer is
read at once, which tells more of what is wrong with it."""


class TextSource(CalibrationSource):
    """Windows of the documents in a file or a data set (for their forms see `calibration.documents`). Each begins
    with the tokens that the tokenizer puts before every text, BOS as a rule, because models that were trained with it
    compute unusual activations without it. Tokenizers that put none there are not affected."""

    name = "text"
    summary = "a .txt, .json, .jsonl or .parquet file, or a data set (name, name:config or name:config:split)"

    class Settings(ComponentSettings):
        bos: bool = Field(
            True,
            description="Begin every window with the tokens that the tokenizer puts before a text (BOS), where it puts "
            "any.",
        )

    settings: Settings

    def check(self, reference: str) -> None:
        check_source(reference)

    def check_amount(self, reference: str, samples: int) -> None:
        places = most_characters(reference)
        if samples > _MANY and places is not None and samples > places:
            raise DataError(
                f"'{reference}' has {places:,} bytes, so {samples:,} samples of it are not all different; lower "
                "--samples"
            )

    def sample(self, task: SampleTask) -> torch.Tensor:
        """Raises `ModelError` where the model has no tokenizer."""
        if task.tokenizer is None:
            raise no_tokenizer("the model", f"it cannot be calibrated on '{task.reference}'; use 'self'")
        from .opening import opening_tokens
        from .windows import windows

        documents = read_documents(task.reference)
        return windows(
            documents, task.tokenizer,
            samples=task.samples, length=task.length, seed=task.seed, source=task.reference,
            opening=opening_tokens(task.tokenizer, documents[0]) if self.settings.bos else (),
        )  # fmt: skip
