"""The rows that a model is trained and validated on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..settings import RecoverSettings
from ..values import counted
from .examples import Examples, Rows, load_examples, rows_of, split

if TYPE_CHECKING:
    from ..discovery.family import ModelFamily


@dataclass(frozen=True)
class TrainingData:
    """The rows of a training. ``source``, ``fingerprint``: of the data, see `Examples`; with data of its own for
    validation, the fingerprint is of both. ``validation``: None without one. ``notes``: messages for the user.
    ``in_format``: see `Examples`."""

    source: str
    fingerprint: str
    rows: Rows
    validation: Rows | None = None
    notes: tuple[str, ...] = ()
    in_format: bool = False


def prepare(
    settings: RecoverSettings, family: ModelFamily, tokenizer: Any, examples: Examples | None = None
) -> TrainingData:
    """Read the data, hold some back for validation, and tokenise it. ``examples``: used instead of ``settings.data``.

    Raises `DataError` for data that cannot be used; no model is needed to find that out.
    """

    def read(source: str, limit: int | None) -> Examples:
        return load_examples(source, family, tokenizer, limit=limit, seed=settings.seed)

    def tokenised(part: Examples) -> Rows:
        return rows_of(part, tokenizer, cutoff=settings.cutoff, loss_on=settings.loss_on, pack=settings.pack)

    examples = examples or read(settings.data, settings.limit)
    held_out, fingerprint, notes = None, examples.fingerprint, []
    if settings.validation_data is not None:
        held_out = read(settings.validation_data, None)
        fingerprint = hashlib.sha256(f"{fingerprint} {held_out.fingerprint}".encode()).hexdigest()
    else:
        examples, held_out = split(examples, settings.validation, settings.seed)
        if held_out is None and settings.validation:
            count = len(examples.texts)
            are = "is" if count == 1 else "are"
            notes.append(f"{counted(count, 'example')} {are} too few to hold some back: no validation")
    rows = tokenised(examples)
    if rows.left_out:
        were = "was" if rows.left_out == 1 else "were"
        notes.append(f"{counted(rows.left_out, 'example')} had nothing to train on and {were} left out")
    validation = None if held_out is None else tokenised(held_out)
    return TrainingData(examples.source, fingerprint, rows, validation, tuple(notes), examples.in_format)
