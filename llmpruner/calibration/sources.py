"""Calibration sources: the base class, and text of files and data sets, conversations, and text that the model writes.
Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ..component import Component, ComponentSettings
from ..errors import DataError
from ..progress import QUIET, Progress
from .conversations import example, read_examples
from .documents import EXPECTED_EXAMPLES, check_source, read_documents

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..discovery.family import ModelFamily


@dataclass(frozen=True)
class SampleTask:
    """The request to a source: ``samples`` sequences of ``length`` tokens each, without padding.

    ``model``: with its weights, in evaluation mode. ``reference``: a file or data set; for other sources than text,
    what follows ``NAME:``. ``tokenizer``: None where the model has none. ``family``: with the model's chat format.
    """

    model: PreTrainedModel
    tokenizer: Any | None
    reference: str
    samples: int
    length: int
    seed: int
    family: ModelFamily
    progress: Progress = QUIET


class CalibrationSource(Component):
    """Provides calibration samples; selected by ``--calibration NAME`` or ``NAME:reference``."""

    kind: ClassVar[str] = "calibration source"
    writes: ClassVar[bool] = False
    """Whether the model generates the text. This is slower than reading, and the tokens depend on the machine's
    arithmetic, so that they may differ when a plan is replayed."""

    def check(self, reference: str) -> None:
        """Raise `DataError` for errors that can be found before a model is loaded. Checks nothing by default."""

    def sample(self, task: SampleTask) -> torch.Tensor:
        """Token ids of the model's vocabulary, int64 of shape (samples, length). The same task gives the same tokens;
        another shape or dtype is a `PluginError`. Raises `DataError` for a text that is missing, malformed or too
        short, and `ModelError` for a model without a tokenizer where one is needed."""
        raise NotImplementedError


class TextSource(CalibrationSource):
    """Windows of the documents in a file or a data set (for their forms see `calibration.documents`). Each begins
    with the tokens that the tokenizer puts before every text, BOS as a rule, because models that were trained with it
    compute unusual activations without it. Tokenizers that put none there are not affected."""

    name = "text"
    summary = "a .txt, .json, .jsonl or .parquet file, or a data set (name, name:config or name:config:split)"

    def check(self, reference: str) -> None:
        check_source(reference)

    def sample(self, task: SampleTask) -> torch.Tensor:
        from .windows import opening_tokens, windows

        documents = read_documents(task.reference)
        return windows(
            documents, task.tokenizer,
            samples=task.samples, length=task.length, seed=task.seed, source=task.reference,
            opening=opening_tokens(task.tokenizer, documents[0]),
        )  # fmt: skip


class ChatSource(CalibrationSource):
    """Instruction data (for its forms see `llmpruner.calibration.conversations`) as the model gets it in use: in the
    tokenizer's chat template, else the format of the family. Every sample begins with a whole conversation, further
    ones follow until it is full, and the last is cut; all are used, in random order, before one is used again."""

    name = "chat"
    summary = "chat:FILE: conversations or instructions with answers, in the model's own chat format"

    def check(self, reference: str) -> None:
        if not reference:
            raise DataError("--calibration chat: name a file or data set with conversations, as chat:FILE")
        check_source(reference, example, EXPECTED_EXAMPLES)

    def sample(self, task: SampleTask) -> torch.Tensor:
        import torch

        from .chat import packed, texts_at, token_ids

        examples = read_examples(task.reference)
        texts = [texts_at(place, found, task.family, task.tokenizer) for place, found in examples]
        encoded = [token_ids(text, task.tokenizer) for each in texts for text in each]
        return torch.tensor(packed(encoded, task.samples, task.length, task.seed, task.reference), dtype=torch.long)


class SelfWritten(CalibrationSource):
    """Text sampled from the model; nothing is read or downloaded. See `llmpruner.calibration.written`."""

    name = "self"
    summary = "text that the model writes itself; nothing is downloaded"
    writes = True

    class Settings(ComponentSettings):
        passage: int = Field(
            64, ge=2, le=16384, description="Maximum tokens per generated passage; samples are made of passages."
        )

    settings: Settings

    def check(self, reference: str) -> None:
        if reference:
            raise DataError(f"--calibration self:{reference}: the model writes this text, so nothing follows 'self'")

    def sample(self, task: SampleTask) -> torch.Tensor:
        from .written import self_generated

        return self_generated(
            task.model, task.tokenizer, task.samples, task.length, task.seed, passage=self.settings.passage,
            as_texts=True, progress=task.progress,
        )  # fmt: skip
