"""The calibration source of conversations in the model's own chat format. Imports no torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DataError, no_tokenizer
from ..models.tokenizer import ids_to_continue
from .chat import TrainingText, training_texts
from .conversations import example, read_examples
from .documents import EXPECTED_EXAMPLES, check_source
from .source import CalibrationSource, SampleTask

if TYPE_CHECKING:
    import torch


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
        """Raises `ModelError` where the model has no tokenizer or its family is not known."""
        import torch

        if task.tokenizer is None or task.family is None:
            raise no_tokenizer("the model", f"it cannot be calibrated on '{task.reference}'; use 'self'")
        examples = read_examples(task.reference)
        texts = [text for found in examples for text in training_texts(found, task.family, task.tokenizer)]
        encoded = [tokens_of(task.tokenizer, text) for text in texts]
        return torch.tensor(packed(encoded, task.samples, task.length, task.seed, task.reference), dtype=torch.long)


def packed(encoded: Sequence[Sequence[int]], samples: int, length: int, seed: int, source: str) -> list[list[int]]:
    """``samples`` rows of ``length`` tokens, of whole conversations in random order, the last of a row cut. ``source``:
    for messages. Raises `DataError` where all conversations together are shorter than a row."""
    if sum(map(len, encoded)) < length:
        raise DataError(f"'{source}' is too short for a sample of {length} tokens; lower --length")
    rng, left = random.Random(seed), list[int]()
    rows: list[list[int]] = []
    while len(rows) < samples:
        row: list[int] = []
        while len(row) < length:
            if not left:
                left = rng.sample(range(len(encoded)), len(encoded))
            row += encoded[left.pop()]
        rows.append(row[:length])
    return rows


def tokens_of(tokenizer: Any, text: TrainingText) -> list[int]:
    """Token ids of a conversation; where its format has no special tokens, with the end of a sequence after answers, as
    in a recovery."""
    joined = "".join(turn.prompt + turn.answer for turn in text.closed_turns(tokenizer.eos_token or ""))
    return ids_to_continue(tokenizer, joined, special=not text.has_special_tokens)
