"""``--data self`` and ``self-text``: examples that the dense model writes, so that a recovery needs no corpus.

One of four rows of ``self`` is an answer to an instruction of ``instructions.txt``, in the model's chat format; the
others, and all rows of ``self-text``, are short texts that it writes from nothing, as for calibration. Tokens are drawn
at temperature 1 from the whole distribution: then the cross entropy of the rows differs from the divergence of the
trained model from the dense one by a constant, in expectation. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.chat import chat_prompt, labelled, training_texts
from ..calibration.conversations import Completion, Example, Instruction
from ..calibration.mixture import parse_mixture
from ..errors import DataError, OutputError
from ..files import is_file, write_text
from ..folders import Held
from ..models.tokenizer import ids_to_continue
from ..progress import QUIET, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..discovery.family import ModelFamily

WRITTEN_FILE = "self-written.jsonl"
"""In the folder of a job: the rows that are written so far, after a line that identifies them."""
ROWS = 512
"""Rows of ``self`` and ``self-text`` without a number."""
ANSWER_TOKENS, TEXT_TOKENS = 192, 64
"""The most tokens of an answer, and those of a text: of as many tokens, short texts cover more subjects."""
LEAST_ANSWER = 16
"""Tokens for which a model with a table of positions must have room after an instruction."""
_MIXED, _TEXTS = "self", "self-text"
_OF = 4
"""One of so many rows of ``self`` is an answer."""
_BATCH = 64
"""Rows that are written at once; memory grows with it."""
_SENTENCE_ENDS = (". ", "! ", "? ", ".\n", "!\n", "?\n", "\n\n")


@dataclass(frozen=True)
class DenseText:
    """A source of rows that the dense model writes. ``source``: as it was given; ``answers``, ``texts``: numbers of
    rows with and without an instruction, at most."""

    source: str
    answers: int
    texts: int

    def identity(self, model: str, seed: int) -> dict[str, Any]:
        """What the rows depend on, as JSON values. ``model``: identifies the dense model."""
        asked = hashlib.sha256("\n".join(instructions()).encode()).hexdigest()
        return {
            "answers": self.answers, "texts": self.texts, "seed": seed, "model": model, "instructions": asked,
            "tokens": [ANSWER_TOKENS, TEXT_TOKENS],
        }  # fmt: skip


def dense_text_in(data: str) -> DenseText | None:
    """The part of the value of ``--data`` that the dense model writes; None where there is none. Raises `DataError`
    for a number of rows that is none, and for more than one such part."""
    found = [text for part in parse_mixture(data) if (text := _parsed(part.source)) is not None]
    if len(found) > 1:
        raise DataError(
            f"--data {data}: the dense model writes one part of the data; name 'self' or 'self-text' once, with the "
            "rows"
        )
    return found[0] if found else None


def _parsed(source: str) -> DenseText | None:
    name, colon, count = source.partition(":")
    if name not in (_MIXED, _TEXTS) or is_file(source):
        return None
    if colon and not (count.isascii() and count.isdecimal() and int(count)):
        raise DataError(f"--data {source}: expected '{name}', or '{name}:N' with N the number of rows to write")
    rows = int(count) if colon else ROWS
    answers = math.ceil(rows / _OF) if name == _MIXED else 0
    return DenseText(source, answers, rows - answers)


def instructions() -> tuple[str, ...]:
    """The instructions that come with llmpruner."""
    text = (files(__package__) / "instructions.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line.strip())


def fitting_instructions(family: ModelFamily, tokenizer: Any, limit: int | None, source: str) -> list[str]:
    """The instructions after which a model with a table of ``limit`` positions has room for `LEAST_ANSWER` tokens of an
    answer and for its end; all without a table. Raises `DataError` where there is none. ``source``: of the data."""
    if limit is None:
        return list(instructions())
    most = limit - LEAST_ANSWER - _ending(family, tokenizer)
    found = [one for one in instructions() if len(_prompt(family, tokenizer, one)) <= most]
    if not found:
        raise DataError(
            f"--data {source}: no instruction with an answer fits into the model's {limit:,} positions; give self-text "
            "or a file"
        )
    return found


def _prompt(family: ModelFamily, tokenizer: Any, instruction: str) -> list[int]:
    prompt = chat_prompt(family, tokenizer, instruction)
    return ids_to_continue(tokenizer, prompt.text, special=not prompt.has_special_tokens)


def _ending(family: ModelFamily, tokenizer: Any) -> int:
    """How many tokens the format has after an answer, and one more, of the answer."""
    asked = instructions()[0]
    (text,) = training_texts(Instruction(asked, "a"), family, tokenizer)
    return len(labelled(text, tokenizer, None, "all")["input_ids"]) - len(_prompt(family, tokenizer, asked))


class WrittenRows:
    """The rows of a job in ``file``, which is written after every batch, so that an interrupted job goes on.

    ``held``: the folder of the run that the file is in; None where it is not known. Raises `OutputError` where the file
    has rows of another job, and before a batch is written where the folder is not that of the run any more.
    """

    def __init__(self, file: Path, identity: Mapping[str, Any], held: Held | None = None) -> None:
        self._file, self._identity, self._held = file, dict(identity), held
        self._batches, self._rows, self.whole = 0, list[dict[str, str]](), False
        if not file.is_file():
            return
        try:
            # Not splitlines: text may hold other characters that end lines.
            head, *rows = map(json.loads, file.read_text(encoding="utf-8").rstrip("\n").split("\n"))
            self._batches, self.whole, self._rows = head.pop("batches"), head.pop("whole"), rows
        except (ValueError, KeyError, AttributeError):
            raise OutputError(f"{file} is damaged; delete it, or start anew with --restart") from None
        if head != self._identity:
            raise OutputError(
                f"{file.parent} holds the state of another recovery job (the text that the model writes differs); "
                "delete it, choose another directory, or start anew with --restart"
            )

    @property
    def examples(self) -> list[Example]:
        """Those with text."""
        found: list[Example] = []
        for row in self._rows:
            if "text" in row:
                found.append(Completion(row["text"]))
            else:
                found.append(Instruction(row["instruction"], row["output"]))
        return found

    def write(
        self,
        text: DenseText,
        model: PreTrainedModel,
        tokenizer: Any,
        family: ModelFamily,
        seed: int,
        progress: Progress = QUIET,
    ) -> None:
        """Write the rows that are missing. Raises `DataError` for a model that writes nothing but blanks, and as
        `fitting_instructions`."""
        writer = _Writer(text, model, tokenizer, family, seed)
        batches = range(self._batches, len(writer.batches) + bool(text.texts))
        for number in progress.track(batches, "The dense model writes examples"):
            self._rows += writer.rows(number)
            self._batches = number + 1
            self._save(whole=False)
        if not self._rows:
            raise DataError(f"--data {text.source}: the dense model writes nothing but blanks; give a file")
        self._save(whole=True)

    def _save(self, *, whole: bool) -> None:
        if self._held is not None:
            self._held.check()
        self.whole = whole
        head = {**self._identity, "batches": self._batches, "whole": whole}
        lines = [json.dumps(line, ensure_ascii=False) for line in (head, *self._rows)]
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._file, "\n".join(lines) + "\n")
        except OSError as error:
            raise OutputError(f"{self._file} cannot be written: {error.strerror}") from None


class _Writer:
    """Writes the rows of one batch after the other: answers, in the order of the lengths of their prompts, and last the
    texts."""

    def __init__(self, text: DenseText, model: PreTrainedModel, tokenizer: Any, family: ModelFamily, seed: int) -> None:
        from ..models.positions import table_of

        self._text, self._model, self._tokenizer, self._seed = text, model, tokenizer, seed
        self._stop, limit = family.stop_text, table_of(model)
        self._text_tokens = TEXT_TOKENS if limit is None else min(TEXT_TOKENS, limit)
        self._most = None if limit is None or not text.answers else limit - _ending(family, tokenizer)
        asked = fitting_instructions(family, tokenizer, limit, text.source) if text.answers else []
        random.Random(seed).shuffle(asked)
        chosen = [asked[number % len(asked)] for number in range(text.answers)]
        prompts = {one: _prompt(family, tokenizer, one) for one in set(chosen)}
        pairs = sorted(((one, prompts[one]) for one in chosen), key=lambda pair: len(pair[1]))
        self.batches = [pairs[first : first + _BATCH] for first in range(0, len(pairs), _BATCH)]

    def rows(self, number: int) -> list[dict[str, str]]:
        return self._texts() if number == len(self.batches) else self._answers(number)

    def _answers(self, number: int) -> list[dict[str, str]]:
        from ..calibration.written import answered

        pairs, first = self.batches[number], number * _BATCH
        # In a batch, prompts have the length of the longest.
        tokens = ANSWER_TOKENS if self._most is None else min(ANSWER_TOKENS, self._most - len(pairs[-1][1]))
        numbers = self._numbers[first : first + len(pairs), :tokens]
        written = answered(self._model, self._tokenizer, [ids for _, ids in pairs], numbers)
        found = []
        for (instruction, _), ids in zip(pairs, written, strict=True):
            answer = self._decoded(ids, finished=len(ids) < tokens, stop=self._stop)
            if answer:
                found.append({"instruction": instruction, "output": answer})
        return found

    def _texts(self) -> list[dict[str, str]]:
        from ..calibration.written import self_generated

        tokens = self_generated(
            self._model, self._tokenizer, self._text.texts, self._text_tokens, self._seed, passage=self._text_tokens,
            batch=_BATCH,
        )  # fmt: skip
        found = [self._decoded(ids, finished=False) for ids in tokens.tolist()]
        return [{"text": one} for one in found if one]

    @cached_property
    def _numbers(self) -> Any:
        """(answers, tokens), points of a scrambled Sobol sequence, see `data.written`."""
        from torch.quasirandom import SobolEngine

        count = sum(map(len, self.batches))
        return SobolEngine(ANSWER_TOKENS, scramble=True, seed=self._seed).draw(count)  # type: ignore[no-untyped-call]

    def _decoded(self, ids: Sequence[int], *, finished: bool, stop: str | None = None) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        if stop and stop in text:
            text, finished = text.partition(stop)[0], True
        return text.strip() if finished else up_to_sentence(text.strip())


def up_to_sentence(text: str) -> str:
    """``text`` up to the end of its last whole sentence, as the end of a row is trained on; all of it where there is
    none."""
    end = max(text.rfind(mark) for mark in _SENTENCE_ENDS)
    return text[: end + 1].strip() if end > 0 else text
