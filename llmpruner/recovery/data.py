"""The rows that a recovery trains on: examples of files and data sets, and text of the dense model. Imports no torch.

With ``--data self`` or ``self-text``, a recovery needs no corpus. One of four rows of ``self`` is an answer to an
instruction, in the model's chat format; the others, and all rows of ``self-text``, are short texts that the model
writes from nothing, as for calibration. But for the first of a text, tokens are drawn at temperature 1 from the whole
distribution: then the cross entropy of the rows differs from the divergence of the trained model from the dense one by
a constant, in expectation.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from os.path import isfile
from typing import TYPE_CHECKING, Any

from ..calibration.chat import texts_at, token_ids
from ..calibration.conversations import Completion, Example, example, read_examples
from ..calibration.documents import EXPECTED_EXAMPLES, check_source, mixed, parse_mixture
from ..catalog import Catalog
from ..errors import DataError, MissingExtraError, SettingsError
from ..progress import QUIET, Progress
from ..settings import RecoverSettings
from ..values import counted
from .base import RecoveryStrategy, Row

if TYPE_CHECKING:
    from ..models.family import ModelFamily
    from ..models.model import Model

ROWS = 512
"""Rows of ``self`` and ``self-text`` without a number."""
ANSWER_TOKENS, TEXT_TOKENS = 192, 64
"""The most tokens of an answer, and those of a text: of as many tokens, short texts cover more subjects."""
_LEAST, _MOST = 48, 128
"""Bounds for a share of examples held back, which is at most a fifth of all: enough to tell a small gain from noise,
and few enough to measure quickly."""


@dataclass(frozen=True)
class RecoverySetup:
    """The settings of a recovery, and what they name. ``dense_text``: what the dense model writes of the data."""

    settings: RecoverSettings
    strategy: RecoveryStrategy
    dense_text: DenseText | None = None

    @property
    def reads_dense(self) -> bool:
        """Whether the dense model writes examples, or teaches."""
        return self.strategy.needs_dense or self.dense_text is not None


@dataclass(frozen=True)
class DenseText:
    """Rows that the dense model writes: ``answers`` to instructions, at most, and ``texts`` without one."""

    source: str
    answers: int
    texts: int


def recovery_setup(settings: RecoverSettings, catalog: Catalog) -> RecoverySetup:
    """Raises `SettingsError` (or `UnknownNameError`, or `DataError`) for settings that are wrong."""
    strategy = catalog[RecoveryStrategy].create_only(settings.strategy, settings.settings)
    return RecoverySetup(settings, strategy, dense_text_in(settings.data))


def check_setup(setup: RecoverySetup) -> None:
    """Refuse what needs no model to be seen: missing or malformed data, missing libraries, and FSDP."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise SettingsError("recover shards a model by itself: launch it without FSDP, and set recover.sharded=true")
    if setup.strategy.needs_peft and find_spec("peft") is None:
        raise MissingExtraError("peft", "recover")
    for source, _ in parse_mixture(setup.settings.data):
        if not _is_dense_text(source):
            check_source(source, example, f"{EXPECTED_EXAMPLES}, or self, self:N or self-text")


def read_data(data: str) -> dict[str, Sequence[tuple[str, Example]]]:
    """The examples of each file and data set in ``data``, with their places. Raises `DataError`."""
    sources = [source for source, _ in parse_mixture(data)]
    return {source: read_examples(source) for source in sources if not _is_dense_text(source)}


def dense_text_in(data: str) -> DenseText | None:
    """What the dense model writes of ``data``. Raises `DataError` for more than one source of this kind."""
    written = [source for source, _ in parse_mixture(data) if _is_dense_text(source)]
    if not written:
        return None
    source, *others = written
    if others:
        raise DataError(f"--data {data}: name 'self' or 'self-text' once, with the number of rows")
    name, colon, count = source.partition(":")
    if colon and not (count.isascii() and count.isdecimal() and int(count)):
        raise DataError(f"--data {source}: expected '{name}', or '{name}:N' with N the number of rows to write")
    rows = int(count) if colon else ROWS
    answers = math.ceil(rows / 4) if name == "self" else 0
    return DenseText(source, answers, rows - answers)


def _is_dense_text(source: str) -> bool:
    return source.partition(":")[0] in ("self", "self-text") and not isfile(source)


def write_examples(text: DenseText, dense: Model, seed: int, progress: Progress = QUIET) -> list[Example]:
    """Let the ``dense`` model write the examples of ``text``. Raises `DataError` where that gives none."""
    from ..calibration.written import answers_to_instructions, self_generated, text_of

    model, tokenizer, examples = dense.network, dense.tokenizer, list[Example]()
    if text.answers:
        examples += answers_to_instructions(model, tokenizer, dense.family, text.answers, ANSWER_TOKENS, seed, progress)
    if text.texts:
        ids = self_generated(
            model, tokenizer, text.texts, TEXT_TOKENS, seed, passage=TEXT_TOKENS,
            progress=progress, label="The dense model writes texts",
        )  # fmt: skip
        texts = (text_of(tokenizer, row, finished=False) for row in ids.tolist())
        examples += [Completion(written) for written in texts if written]
    if not examples:
        raise DataError(f"--data {text.source}: the dense model writes nothing but blanks; give a file")
    return examples


@dataclass(frozen=True)
class TrainingData:
    """``rows``: of so many ``examples``; ``validation``: with ``held_out``, rows that are not trained on, else some of
    ``rows``."""

    examples: int
    rows: list[Row]
    validation: list[Row]
    held_out: bool


def prepare(
    settings: RecoverSettings,
    sources: Mapping[str, Sequence[tuple[str, Example]]],
    family: ModelFamily,
    tokenizer: Any,
    positions: int | None = None,
) -> TrainingData:
    """Mix all ``sources``, hold some examples back, and tokenise. Examples to train on are joined, one after the other,
    and cut into rows of ``cutoff`` tokens; those held back are rows of their own, of ``cutoff`` tokens at most. Each
    ends with the end of text; instructions and conversations are in the model's chat format. Raises `DataError`."""
    examples = mixed([(share, sources[source]) for source, share in parse_mixture(settings.data)], settings.seed)
    if settings.limit is not None:
        random.Random(settings.seed).shuffle(examples)
        examples = examples[: settings.limit]
    if settings.validation >= len(examples):
        held = f"--validation takes {int(settings.validation)} of them; leave some to train on"
        raise DataError(f"{settings.data} has {counted(len(examples), 'example')}, and {held}")
    count = int(settings.validation)
    if 0 < settings.validation < 1:
        count = min(max(round(settings.validation * len(examples)), _LEAST), _MOST, len(examples) // 5)
    chosen = set(random.Random(f"{settings.seed} validation").sample(range(len(examples)), count))
    cutoff = settings.cutoff if positions is None else min(settings.cutoff, positions)
    held_back: list[list[int]] = []
    joined: list[int] = []
    for number, (place, entry) in enumerate(examples):
        texts = [_ended(token_ids(text, tokenizer), tokenizer) for text in texts_at(place, entry, family, tokenizer)]
        if number in chosen:
            held_back += [ids[:cutoff] for ids in texts]
        else:
            joined += chain.from_iterable(texts)
    # What fills no row at the end is left out, unless it is all there is.
    whole = max(len(joined) - len(joined) % cutoff, min(len(joined), cutoff))
    rows = _rows(joined[start : start + cutoff] for start in range(0, whole, cutoff))
    if not rows:
        raise DataError(f"{settings.data}: no example has two tokens, so there is nothing to train on")
    validation = _rows(held_back)
    some = validation or rows[:: max(1, len(rows) // _LEAST)][:_LEAST]
    return TrainingData(len(examples) - len(chosen), rows, some, bool(validation))


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _rows(tokens: Iterable[list[int]]) -> list[Row]:
    # The first token of a row is not predicted.
    return [{"input_ids": ids, "labels": ids} for ids in tokens if len(ids) > 1]
