"""Calibration sources: the base class, and text of files and data sets, conversations, and text that the model writes.
Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ..component import Component, ComponentSettings
from ..errors import DataError, no_tokenizer
from ..progress import QUIET, Progress
from .conversations import example, read_examples
from .documents import EXPECTED_EXAMPLES, check_source, read_documents

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SampleTask:
    """The request to a source: ``samples`` sequences of ``length`` tokens each, without padding.

    ``model``: with its weights, in evaluation mode. ``reference``: a file or data set; for other sources than text,
    what follows ``NAME:``. ``tokenizer``: None where the model has none. ``family``: the model's `ModelFamily`, with
    its chat format; None where it is not known.
    """

    model: PreTrainedModel
    tokenizer: Any | None
    reference: str
    samples: int
    length: int
    seed: int
    progress: Progress = QUIET
    family: Any | None = None


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

    class Settings(ComponentSettings):
        bos: bool = Field(
            True,
            description="Begin every window with the tokens that the tokenizer puts before a text (BOS), where it puts "
            "any.",
        )

    settings: Settings

    def check(self, reference: str) -> None:
        check_source(reference)

    def sample(self, task: SampleTask) -> torch.Tensor:
        from .windows import opening_tokens, windows

        if task.tokenizer is None:
            raise no_tokenizer("the model", f"it cannot be calibrated on '{task.reference}'; use 'self'")
        documents = read_documents(task.reference)
        return windows(
            documents, task.tokenizer,
            samples=task.samples, length=task.length, seed=task.seed, source=task.reference,
            opening=opening_tokens(task.tokenizer, documents[0]) if self.settings.bos else (),
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

        from .chat import chat_tokens, packed, training_texts

        if task.tokenizer is None or task.family is None:
            raise no_tokenizer("the model", f"it cannot be calibrated on '{task.reference}'; use 'self'")
        examples = read_examples(task.reference)
        texts = [text for record in examples for text in training_texts(record, task.family, task.tokenizer)]
        encoded = [chat_tokens(task.tokenizer, text) for text in texts]
        return torch.tensor(packed(encoded, task.samples, task.length, task.seed, task.reference), dtype=torch.long)


class SelfWritten(CalibrationSource):
    """Text sampled from the model; nothing is read or downloaded. See `llmpruner.calibration.written`.

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
        from .written import self_generated, written_chats

        settings, chats = self.settings, None
        count = round(task.samples * settings.chats)
        if settings.chats and not count:
            raise DataError(f"self.chats: {settings.chats:g} of {task.samples} samples is none; raise it, or --samples")
        if count:
            if task.tokenizer is None or task.family is None:
                raise no_tokenizer("the model", "it cannot write conversations; leave self.chats out")
            # First, as they may be refused, and passages take longer. They are longer than passages, so that fewer are
            # written at once.
            chats = written_chats(
                task.model, task.tokenizer, task.family, count, task.length, task.seed,
                batch=-(-settings.batch // 2), progress=task.progress,
            )  # fmt: skip
            if count == task.samples:
                return chats
        passages = self_generated(
            task.model, task.tokenizer, task.samples - count, task.length, task.seed,
            passage=settings.passage, batch=settings.batch, starts=settings.starts, progress=task.progress,
        )  # fmt: skip
        if chats is None:
            return passages
        # Spread evenly, as some components read only the first samples.
        places = [(number + 1) * task.samples // count - 1 for number in range(count)]
        rows = passages.new_empty(task.samples, task.length)
        rows[places] = chats
        rows[sorted({*range(task.samples)} - {*places})] = passages
        return rows
