"""The rows that a model is trained and validated on, from files, data sets, and text that the dense model writes."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..calibration.chat import texts_at, token_ids
from ..calibration.conversations import Completion, Example, example, read_examples
from ..calibration.documents import EXPECTED_EXAMPLES, check_source, mixed, parse_mixture
from ..errors import DataError
from ..values import counted
from .base import Row
from .dense_text import dense_text_in

if TYPE_CHECKING:
    from ..discovery.family import ModelFamily
    from ..settings import RecoverSettings

_LEAST, _MOST = 48, 128
"""Examples for validation where a share of the data is asked for, at most a fifth of the data: enough to tell a small
gain from noise (of the texts that a model writes, some 15 rows of 256 tokens), and few enough to take little time."""


@dataclass(frozen=True)
class TrainingData:
    """Tokenised examples, see `Row`."""

    rows: list[Row]
    validation: list[Row]
    """With ``held_out``, rows that are not trained on; else some of ``rows``."""
    held_out: bool

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all rows in their order."""
        return hashlib.sha256(json.dumps([self.rows, self.validation]).encode()).hexdigest()


def check_data(data: str) -> None:
    """Raise `DataError` for data that is missing or begins malformed."""
    for source in _stored(data):
        check_source(source, example, f"{EXPECTED_EXAMPLES}, or self, self:N or self-text")


def read_data(data: str) -> dict[str, Sequence[tuple[str, Example]]]:
    """The examples of each source that ``data`` names, but for what the dense model writes; each with its place, such
    as ``a.jsonl, line 3``. Raises `DataError`."""
    return {source: read_examples(source) for source in _stored(data)}


def _stored(data: str) -> list[str]:
    """The files and data sets that ``data`` names."""
    written = dense_text_in(data)
    return [part.source for part in parse_mixture(data) if written is None or part.source != written.source]


def prepare(
    settings: RecoverSettings,
    sources: Mapping[str, Sequence[tuple[str, Example]]],
    family: ModelFamily,
    tokenizer: Any,
    positions: int | None = None,
) -> TrainingData:
    """Mix the examples of all ``sources``, hold some back for validation, and tokenise them: an instruction or a
    conversation is a row, in the model's chat format and cut at ``cutoff``; texts are joined to rows of ``cutoff``
    tokens. ``positions``: of a model with a table of them. Raises `DataError`."""
    examples = mixed([(part, sources[part.source]) for part in parse_mixture(settings.data)], settings.seed)
    if settings.limit is not None:
        random.Random(settings.seed).shuffle(examples)
        examples = examples[: settings.limit]
    count = _held_out(settings.validation, len(examples), settings.data)
    chosen = set(random.Random(f"{settings.seed} validation").sample(range(len(examples)), count))
    cutoff = settings.cutoff if positions is None else min(settings.cutoff, positions)
    rows = _tokenised([e for n, e in enumerate(examples) if n not in chosen], family, tokenizer, cutoff)
    validation = _tokenised([e for n, e in enumerate(examples) if n in chosen], family, tokenizer, cutoff)
    if not rows:
        raise DataError(f"{settings.data}: no example has two tokens, so there is nothing to train on")
    return TrainingData(rows, validation or rows[:: max(1, len(rows) // _LEAST)][:_LEAST], bool(validation))


def _held_out(validation: float, examples: int, source: str) -> int:
    """How many examples are held back for validation. Raises `DataError` where none is left to train on."""
    if validation >= examples:
        raise DataError(
            f"{source} has {counted(examples, 'example')}, and --validation takes {int(validation)} of them; leave "
            "some to train on"
        )
    if validation >= 1 or validation == 0:
        return int(validation)
    return min(max(round(validation * examples), _LEAST), _MOST, examples // 5)


def _tokenised(examples: Sequence[tuple[str, Example]], family: ModelFamily, tokenizer: Any, cutoff: int) -> list[Row]:
    """Rows of 2 to ``cutoff`` tokens."""
    rows: list[list[int]] = []
    joined: list[int] = []
    for place, found in examples:
        texts = texts_at(place, found, family, tokenizer)
        if isinstance(found, Completion):
            for text in texts:
                ids = token_ids(text, tokenizer)
                end = tokenizer.eos_token_id
                joined += ids if end is None or ids[-1:] == [end] else [*ids, end]
        else:
            rows += [token_ids(text, tokenizer)[:cutoff] for text in texts]
    # What fills no row at the end is left out, unless it is all there is.
    whole = max(len(joined) - len(joined) % cutoff, min(len(joined), cutoff))
    rows += [joined[start : start + cutoff] for start in range(0, whole, cutoff)]
    # The first token of a row is not predicted.
    return [{"input_ids": ids, "labels": ids} for ids in rows if len(ids) > 1]
