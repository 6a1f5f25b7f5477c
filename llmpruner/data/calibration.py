"""Calibration: a handful of token sequences that importance is measured on.

Nothing has to be downloaded: by default the model writes its own text.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DataError, MissingExtraError, ModelError
from .written import self_generated

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


SELF = "self"
_TEXT_FIELDS = ("text", "page", "content")
_CHARACTERS_PER_TOKEN = 12
_ATTEMPTS = 200
_WINDOWS_PER_PIECE = 8
_BETWEEN = "\n\n"


@dataclass(frozen=True)
class CalibrationSet:
    """``input_ids``: int64, shape (samples, length), no padding. ``fingerprint``: SHA-256 over its bytes."""

    input_ids: torch.Tensor
    source: str

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        digest.update(self.input_ids.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def first(self, tokens: int) -> CalibrationSet:
        """The first samples, of about ``tokens`` tokens in all; everything where there are fewer."""
        return CalibrationSet(self.input_ids[: max(1, tokens // self.input_ids.shape[1])], self.source)


def calibration_set(
    source: str, model: PreTrainedModel, tokenizer: Any | None, *, samples: int, length: int, seed: int
) -> CalibrationSet:
    """``samples`` sequences of ``length`` tokens from ``self``, a ``.txt`` / ``.jsonl`` / ``.json`` file, or a
    datasets name (``name``, ``name:config`` or ``name:config:split``). Several with commas between them are mixed in
    equal parts, one sequence of each in turn.

    Raises `DataError` when a source is missing, malformed, or too short.
    """
    if samples < 1 or length < 2:
        raise DataError(f"calibration needs at least 1 sample of 2 tokens, got {samples} × {length}")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise DataError(f"calibration length {length} is beyond the model's {limit} positions; lower --length")
    parts = sources_of(source)
    if len(parts) > samples:
        raise DataError(f"{samples} samples cannot be shared by {len(parts)} sources; raise --samples")
    shares = [_from_one(part, model, tokenizer, -(-samples // len(parts)), length, seed) for part in parts]
    return CalibrationSet(torch.stack(shares, 1).flatten(0, 1)[:samples], source)


def sources_of(source: str) -> list[str]:
    """The parts of a mixture; a file whose name has commas is one source."""
    if Path(source).is_file():
        return [source]
    parts = [part.strip() for part in source.split(",")]
    if not all(parts):
        raise DataError(f"--calibration '{source}' names an empty source; write them with one comma in between")
    return parts


def _from_one(
    source: str, model: PreTrainedModel, tokenizer: Any | None, samples: int, length: int, seed: int
) -> torch.Tensor:
    if source == SELF:
        return self_generated(model, tokenizer, samples, length, seed)
    if tokenizer is None:
        raise ModelError(f"the model brings no tokenizer, so it cannot be calibrated on '{source}'; use 'self'")
    return _windows(read_documents(source), tokenizer, samples, length, seed, source)


def read_documents(source: str) -> list[str]:
    """The non-empty documents of a text source; see `calibration_set`."""
    path = Path(source)
    if path.is_file():
        documents = _read_file(path)
    elif path.suffix.lower() in (".txt", ".json", ".jsonl"):
        raise DataError(f"file '{source}' does not exist")
    else:
        documents = _read_dataset(source)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise DataError(f"'{source}' holds no text")
    return documents


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read '{path}' as UTF-8 text: {error}") from error
    if path.suffix.lower() == ".jsonl":
        return [_text_of(line, f"{path}, line {n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if path.suffix.lower() == ".json":
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise DataError(f"'{path}' is not valid JSON: {error}") from error
        if not isinstance(rows, list):
            raise DataError(f"'{path}' must hold a list of rows")
        return [_field_of(row, f"{path}, row {n}") for n, row in enumerate(rows, 1)]
    return [text]


def _text_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error
    return _field_of(row, where)


def _field_of(row: Any, where: str) -> str:
    if isinstance(row, str):
        return row
    for name in _TEXT_FIELDS:
        if isinstance(row, dict) and isinstance(row.get(name), str):
            return str(row[name])
    raise DataError(f"{where}: expected an object with one of the fields {', '.join(_TEXT_FIELDS)}")


def _read_dataset(source: str) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "recover") from error
    name, config, split = [*source.split(":"), None, None][:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"'{source}' is neither a file nor a data set that can be loaded: {reason}") from error
    return [_field_of(row, f"{source}, row {n}") for n, row in enumerate(rows)]


def _windows(documents: list[str], tokenizer: Any, samples: int, length: int, seed: int, source: str) -> torch.Tensor:
    """Windows in random order that do not overlap, as widely spread as possible; where the text has too few of them,
    the rest are drawn anywhere in it. Documents follow one another in random order, so that short ones count too."""
    rng = random.Random(seed)
    text = _BETWEEN.join(rng.sample(documents, len(documents)))
    rounds: list[list[list[int]]] = []
    for piece in _pieces(text, length * _CHARACTERS_PER_TOKEN * _WINDOWS_PER_PIECE, rng)[:samples]:
        ids = _tokens(tokenizer, piece)
        starts = [number * length for number in range(len(ids) // length)]
        rng.shuffle(starts)
        for turn, start in enumerate(starts):
            if turn == len(rounds):
                rounds.append([])
            rounds[turn].append(ids[start : start + length])
    rows = [row for later in rounds for row in later][:samples]
    rows += _anywhere(text, tokenizer, samples - len(rows), length, rng)
    if len(rows) < samples:
        raise DataError(
            f"'{source}' is too short for {samples} samples of {length} tokens; lower --samples or --length"
        )
    return torch.tensor(rows, dtype=torch.long)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _pieces(text: str, size: int, rng: random.Random) -> list[str]:
    """The text in pieces of about ``size`` characters that begin with a word, in random order."""
    found: list[str] = []
    start, stop = 0, rng.randrange(1, size + 1) if len(text) > size else size
    while start < len(text):
        while stop < len(text) and not text[stop - 1].isspace():
            stop += 1
        found.append(text[start:stop])
        start, stop = stop, stop + size
    rng.shuffle(found)
    return found


def _anywhere(text: str, tokenizer: Any, samples: int, length: int, rng: random.Random) -> list[list[int]]:
    """The first ``length`` tokens from random places."""
    span = length * _CHARACTERS_PER_TOKEN
    rows: list[list[int]] = []
    for _ in range(samples * _ATTEMPTS):
        if len(rows) == samples:
            break
        start = rng.randrange(max(1, len(text) - span + 1))
        while 0 < start < len(text) and not text[start - 1].isspace():
            start += 1
        ids = _tokens(tokenizer, text[start : start + span])[:length]
        if len(ids) == length:
            rows.append(ids)
    return rows
