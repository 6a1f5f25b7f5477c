"""Examples for recovery: read from a source, formatted for the model, tokenised into rows, and split into those that
are trained on and those for validation."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from ..calibration.chat import IGNORED, TrainingText, labelled, training_texts
from ..calibration.conversations import Completion, Example, example
from ..calibration.documents import EXPECTED_EXAMPLES, read_records
from ..calibration.mixture import mixed, parse_mixture
from ..errors import DataError
from ..values import counted

if TYPE_CHECKING:
    from ..discovery.family import ModelFamily
    from ..settings import LossOn

LEAST_VALIDATION, MOST_VALIDATION = 16, 128
"""Examples for validation, where a share of the data is given: enough for a loss to compare by, and few enough that a
validation takes a small part of the time of the steps between two."""


@dataclass(frozen=True)
class Examples:
    """The training text. ``source``: the source of the data, for messages and records. ``places``: for every text, the
    place of its record, such as ``a.jsonl, line 3``; several texts may be of one record. Empty where they are not
    known. ``in_format``: whether some are instructions or conversations, which are in a chat format, and not text as it
    is."""

    texts: tuple[TrainingText, ...]
    source: str
    places: tuple[str, ...] = ()
    in_format: bool = False

    def place(self, number: int) -> str:
        """Where text ``number``, from 0, is from."""
        return self.places[number] if self.places else f"{self.source}, example {number + 1}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all texts in their order."""
        digest = hashlib.sha256()
        for text in self.texts:
            content: Any = [text.turns, "special tokens"] if text.has_special_tokens else text.turns
            if not text.has_special_tokens and text.eos_after != "every":
                content = [text.turns, f"end after {text.eos_after}"]
            digest.update(json.dumps(content).encode() + b"\n")
        return digest.hexdigest()


def load_examples(
    source: str,
    family: ModelFamily,
    tokenizer: Any,
    *,
    limit: int | None = None,
    seed: int = 0,
    written: Mapping[str, Sequence[Example]] | None = None,
) -> Examples:
    """Read the instruction data of ``source`` (see `calibration.conversations`) and format it for the model (see
    `llmpruner.calibration.chat`).

    ``source``: one, or several (see `calibration.mixture`). ``limit``: number of examples to draw at random, by
    ``seed``; None: all, in order. ``written``: the examples of sources that are not read. Raises `DataError` with the
    place of the first example that is malformed, or that the model's format does not support.
    """
    parts = parse_mixture(source)
    places = mixed([(part, _placed(part.source, written or {})) for part in parts], seed)
    if limit is not None:
        random.Random(seed).shuffle(places)
        places = places[:limit]
    texts: list[TrainingText] = []
    of: list[str] = []
    for place, found in places:
        try:
            own = training_texts(found, family, tokenizer)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        texts += own
        of += [place] * len(own)
    in_format = any(not isinstance(found, Completion) for _, found in places)
    return Examples(tuple(texts), source, tuple(of), in_format)


def _placed(source: str, written: Mapping[str, Sequence[Example]]) -> list[tuple[str, Example]]:
    """The examples of one source, each with the place of its record. Raises `DataError` as `example` does, and where
    there is none."""
    if source in written:
        return [(f"{source}, example {number}", found) for number, found in enumerate(written[source], start=1)]
    found = [(record.place, example(record)) for record in read_records(source, EXPECTED_EXAMPLES)]
    if not found:
        raise DataError(f"{source} has no examples")
    return found


def split(examples: Examples, validation: float, seed: int) -> tuple[Examples, Examples | None]:
    """The examples to train on, and those for validation, drawn by ``seed``; texts of one record stay together.

    ``validation``: below 1 a share, of which there are at least `LEAST_VALIDATION` and at most `MOST_VALIDATION`, and
    none (the second result is None) where that is more than a fifth of the data; from 1 on, the number of records.
    Raises `DataError` where the number leaves nothing to train on.
    """
    of = [examples.place(number) for number in range(len(examples.texts))]
    records = list(dict.fromkeys(of))
    count = validation_records(validation, len(records), examples.source)
    if count == 0:
        return examples, None
    chosen = set(random.Random(f"{seed} validation").sample(records, count))

    def part(held_out: bool) -> Examples:
        numbers = [number for number, place in enumerate(of) if (place in chosen) == held_out]
        texts, own = tuple(examples.texts[n] for n in numbers), tuple(of[n] for n in numbers)
        return replace(examples, texts=texts, places=own)

    return part(False), part(True)


def validation_records(validation: float, records: int, source: str) -> int:
    """How many of ``records`` `split` holds back. Raises `DataError` where nothing is left to train on."""
    if validation >= 1:
        if int(validation) >= records:
            raise DataError(
                f"{source} has {counted(records, 'example')}, and --validation takes {int(validation)} of them; "
                "leave some to train on"
            )
        return int(validation)
    count = min(max(round(validation * records), LEAST_VALIDATION), MOST_VALIDATION)
    return 0 if validation == 0 or count > records // 5 else count


@dataclass(frozen=True)
class Rows:
    """Tokenised examples. ``rows``: see `tokenise`. ``places``: for every row, where it is from. ``left_out``: number
    of texts that had no token to train on."""

    rows: list[dict[str, list[int]]]
    places: list[str]
    left_out: int = 0


def tokenise(
    examples: Examples, tokenizer: Any, *, cutoff: int, loss_on: LossOn, pack: bool = False
) -> list[dict[str, list[int]]]:
    """``input_ids`` and ``labels`` of every text, truncated to ``cutoff`` tokens; with ``pack``, of rows of ``cutoff``
    tokens into which all texts are joined, without the rest at the end that fills no row.

    A label is its token; with ``loss_on="answers"``, `IGNORED` for tokens that have no character of an answer. Rows
    without tokens to train on are left out. Raises `DataError` when that is all of them.
    """
    return rows_of(examples, tokenizer, cutoff=cutoff, loss_on=loss_on, pack=pack).rows


def rows_of(examples: Examples, tokenizer: Any, *, cutoff: int, loss_on: LossOn, pack: bool = False) -> Rows:
    """As `tokenise`, with the place of every row."""
    rows = [labelled(text, tokenizer, None if pack else cutoff, loss_on) for text in examples.texts]
    places = [examples.place(number) for number in range(len(rows))]
    if pack:
        rows, places = _packed(rows, places, cutoff, tokenizer)
    # The first token of a text is not predicted.
    kept = [number for number, row in enumerate(rows) if any(label != IGNORED for label in row["labels"][1:])]
    if not kept:
        raise DataError(f"{examples.source}: no example has an answer within the first {cutoff} tokens")
    left_out = 0 if pack else len(rows) - len(kept)
    return Rows([rows[number] for number in kept], [places[number] for number in kept], left_out)


def _packed(
    rows: Sequence[dict[str, list[int]]], places: Sequence[str], cutoff: int, tokenizer: Any
) -> tuple[list[dict[str, list[int]]], list[str]]:
    """Rows of ``cutoff`` tokens; one row where all texts together are shorter. Texts without an end of
    sequence at their end get one, so that the model sees where one ends. And the place of every row: of its first text,
    and of its last."""
    eos = tokenizer.eos_token_id
    ids: list[int] = []
    labels: list[int] = []
    of: list[int] = []
    for number, row in enumerate(rows):
        ended = eos is None or _ends_with(eos, row["input_ids"], tokenizer)
        ids += row["input_ids"] if ended else [*row["input_ids"], eos]
        labels += row["labels"] if ended else [*row["labels"], IGNORED]
        of += [number] * (len(ids) - len(of))
    whole = max(len(ids) - len(ids) % cutoff, min(len(ids), cutoff))
    starts = range(0, whole, cutoff)
    ends = [(places[of[start]], places[of[min(start + cutoff, len(ids)) - 1]]) for start in starts]
    return (
        [{"input_ids": ids[start : start + cutoff], "labels": labels[start : start + cutoff]} for start in starts],
        [first if first == last else f"{first} to {last}" for first, last in ends],
    )


def _ends_with(eos: int, ids: Sequence[int], tokenizer: Any) -> bool:
    """Whether nothing but blanks follows ``eos``: many chat templates have a new line there."""
    after = list(takewhile(lambda token: token != eos, reversed(ids)))
    return len(after) < min(len(ids), _BLANKS) and not tokenizer.decode(after[::-1]).strip()


_BLANKS = 8
"""Tokens that blanks at the end of a text have at most."""
