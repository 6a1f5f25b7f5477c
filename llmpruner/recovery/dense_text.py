"""``--data self`` and ``self-text``: examples that the dense model writes, so that a recovery needs no corpus.

One of four rows of ``self`` is an answer to an instruction of ``instructions.txt``, in the model's chat format; the
others, and all rows of ``self-text``, are short texts that it writes from nothing, as for calibration. Tokens are drawn
at temperature 1 from the whole distribution: then the cross entropy of the rows differs from the divergence of the
trained model from the dense one by a constant, in expectation. Imports no torch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from os.path import isfile
from typing import TYPE_CHECKING, Any

from ..calibration.chat import chat_prompt
from ..calibration.conversations import Completion, Example, Instruction
from ..calibration.documents import parse_mixture
from ..errors import DataError
from ..progress import QUIET, Progress

if TYPE_CHECKING:
    from ..models.model import Model

ROWS = 512
"""Rows of ``self`` and ``self-text`` without a number."""
ANSWER_TOKENS, TEXT_TOKENS = 192, 64
"""The most tokens of an answer, and those of a text: of as many tokens, short texts cover more subjects."""
_MIXED, _TEXTS = "self", "self-text"
_ROWS_PER_ANSWER = 4
"""One of so many rows of ``self`` answers an instruction."""
_BATCH = 64
"""Rows that are written at once; memory grows with it."""
_SENTENCE_ENDS = (". ", "! ", "? ", ".\n", "!\n", "?\n", "\n\n")


@dataclass(frozen=True)
class DenseText:
    """A source of rows that the dense model writes. ``source``: as the user wrote it; ``answers``, ``texts``: numbers
    of rows with and without an instruction, at most."""

    source: str
    answers: int
    texts: int


def dense_text_in(data: str) -> DenseText | None:
    """The part of the value of ``--data`` that the dense model writes, at most one; None where there is none."""
    parts = [text for part in parse_mixture(data) if (text := _parsed(part.source)) is not None]
    if len(parts) > 1:
        raise DataError(f"--data {data}: name 'self' or 'self-text' once, with the number of rows")
    return parts[0] if parts else None


def _parsed(source: str) -> DenseText | None:
    name, colon, count = source.partition(":")
    if name not in (_MIXED, _TEXTS) or isfile(source):
        return None
    if colon and not (count.isascii() and count.isdecimal() and int(count)):
        raise DataError(f"--data {source}: expected '{name}', or '{name}:N' with N the number of rows to write")
    rows = int(count) if colon else ROWS
    answers = math.ceil(rows / _ROWS_PER_ANSWER) if name == _MIXED else 0
    return DenseText(source, answers, rows - answers)


def instructions() -> tuple[str, ...]:
    """The instructions that come with llmpruner."""
    text = (files(__package__) / "instructions.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line.strip())


def write_examples(text: DenseText, dense: Model, seed: int, progress: Progress = QUIET) -> list[Example]:
    """Let the ``dense`` model write the examples of ``text``. Raises `DataError` where that gives none."""
    from ..calibration.written import self_generated

    examples: list[Example] = []
    if text.answers:
        examples += _answers(text, dense, seed, progress)
    if text.texts:
        ids = self_generated(
            dense.model, dense.tokenizer, text.texts, TEXT_TOKENS, seed, passage=TEXT_TOKENS, batch=_BATCH,
            progress=progress, label="The dense model writes texts",
        )  # fmt: skip
        texts = (_decoded(dense.tokenizer, row, finished=False) for row in ids.tolist())
        examples += [Completion(written) for written in texts if written]
    if not examples:
        raise DataError(f"--data {text.source}: the dense model writes nothing but blanks; give a file")
    return examples


def _answers(text: DenseText, dense: Model, seed: int, progress: Progress) -> list[Example]:
    from torch.quasirandom import SobolEngine

    from ..calibration.written import answered
    from ..models.generation import table_of
    from ..models.tokenizer import ids_to_continue

    model, tokenizer, family = dense.model, dense.tokenizer, dense.family
    prompts: dict[str, list[int]] = {}
    for instruction in instructions():
        prompt = chat_prompt(family, tokenizer, instruction)
        prompts[instruction] = ids_to_continue(tokenizer, prompt.text, special=not prompt.has_special_tokens)
    needed, positions = max(map(len, prompts.values())) + ANSWER_TOKENS, table_of(model.config)
    if positions is not None and needed > positions:
        raise DataError(
            f"--data {text.source}: instructions with answers take {needed} tokens, and the model has {positions:,} "
            "positions; give self-text or a file"
        )
    asked = list(prompts)
    random.Random(seed).shuffle(asked)
    # In a batch, prompts have the length of the longest.
    chosen = sorted((asked[n % len(asked)] for n in range(text.answers)), key=lambda each: len(prompts[each]))
    # Points of a scrambled Sobol sequence, see `calibration.written`.
    numbers = SobolEngine(ANSWER_TOKENS, scramble=True, seed=seed).draw(len(chosen))  # type: ignore[no-untyped-call]
    examples: list[Example] = []
    for first in progress.track(range(0, len(chosen), _BATCH), "The dense model answers instructions"):
        batch = chosen[first : first + _BATCH]
        drawn = numbers[first : first + len(batch)]
        answers = answered(model, tokenizer, [prompts[each] for each in batch], ANSWER_TOKENS, drawn)
        for instruction, ids in zip(batch, answers, strict=True):
            answer = _decoded(tokenizer, ids, finished=len(ids) < ANSWER_TOKENS, stop=family.stop_text)
            if answer:
                examples.append(Instruction(instruction, answer))
    return examples


def _decoded(tokenizer: Any, ids: Sequence[int], *, finished: bool, stop: str | None = None) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    if stop and stop in text:
        text, finished = text.partition(stop)[0], True
    return text.strip() if finished else up_to_sentence(text.strip())


def up_to_sentence(text: str) -> str:
    """``text`` up to the end of its last whole sentence, as the end of a row is trained on; all of it where there is
    none."""
    end = max(text.rfind(mark) for mark in _SENTENCE_ENDS)
    return text[: end + 1].strip() if end > 0 else text
