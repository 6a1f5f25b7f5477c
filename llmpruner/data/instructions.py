"""Instruction data for recovery: read from files or the hub, formatted by the family, tokenised with
labels."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from ..errors import DataError, MissingExtraError
from .sharegpt import exchanges, read_sharegpt

if TYPE_CHECKING:
    import torch

    from ..families.family import ModelFamily

IGNORED = -100
"""The label of a token that is not trained on (transformers' convention)."""

_FIELDS = "expected 'instruction', 'output' and optionally 'input', or 'conversations', or 'text'"


class Turn(NamedTuple):
    """One prompt, already formatted, and the answer to it. Free text is a turn with an empty prompt."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Examples:
    """Formatted examples, each one or more turns. ``fingerprint``: SHA-256 over all texts in their order."""

    rows: tuple[tuple[Turn, ...], ...]
    source: str

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
        return digest.hexdigest()


def load_examples(source: str, family: ModelFamily, *, limit: int | None = None, seed: int = 0) -> Examples:
    """Read ``source``: a ``.json`` (one list) or ``.jsonl`` file of records, or the name of a dataset on the
    hub.

    A record is Alpaca's (``instruction``, ``output``, optional ``input``), formatted by ``family.format_prompt``, or
    ShareGPT's (``conversations``), formatted by ``family.format_conversation``, or has a ``text``, taken as it is.
    ``limit`` draws that many records at random, by ``seed``; otherwise the order of the source is kept. Raises
    `DataError` with the place of the first bad record.
    """
    rows = [_turns(record, where, family) for where, record in _records(source)]
    if not rows:
        raise DataError(f"{source} has no examples")
    if limit is not None:
        if limit < 1:
            raise DataError(f"cannot train on {limit} examples; expected at least 1")
        random.Random(seed).shuffle(rows)
        rows = rows[:limit]
    return Examples(tuple(rows), source)


def _records(source: str) -> Iterator[tuple[str, Any]]:
    """Every record with the place it stands in, for error messages."""
    path = Path(source)
    if path.is_file():
        if path.suffix == ".jsonl":
            return _json_lines(path)
        if path.suffix == ".json":
            return _json_list(path)
        raise DataError(f"{source}: expected a .json or .jsonl file of instruction records")
    if path.is_dir():
        raise DataError(f"{source} is a directory; expected a .json or .jsonl file, or the name of a dataset")
    if path.suffix in (".json", ".jsonl", ".txt") or path.is_absolute() or source.startswith((".", "~")):
        raise DataError(f"{source}: no such file")
    return _hub_rows(source)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not valid JSON ({error.msg})") from None


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a JSON list of records, found {type(records).__name__}")
    for number, record in enumerate(records, start=1):
        yield f"{path}, record {number}", record


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _hub_rows(name: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "recover") from None
    # Offline, no such name, gated, malformed: each is an error of its own, and all mean the same to the user.
    try:
        table = datasets.load_dataset(name, split="train")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"'{name}' is no file here, and cannot be loaded as the train split of a dataset: {reason}"
        ) from error
    for number, record in enumerate(table, start=1):
        yield f"dataset {name}, row {number}", record


def _turns(record: Any, where: str, family: ModelFamily) -> tuple[Turn, ...]:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: {_FIELDS}; found {type(record).__name__}")
    if "instruction" in record and "output" in record:
        instruction, context = _text(record, "instruction", where), _text(record, "input", where)
        if not instruction.strip():
            raise DataError(f"{where}: 'instruction' is empty")
        return (Turn(*family.training_pair(instruction, _text(record, "output", where), context)),)
    if "conversations" in record:
        turns = read_sharegpt(record["conversations"], where)
        return tuple(Turn(*pair) for pair in family.format_conversation(exchanges(turns)))
    if "text" in record:
        text = _text(record, "text", where)
        if not text.strip():
            raise DataError(f"{where}: 'text' is empty")
        return (Turn("", family.format_text(text)),)
    raise DataError(f"{where}: {_FIELDS}; found {', '.join(map(repr, record)) or 'nothing'}")


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if value is None and field == "input":
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: '{field}' must be text, found {type(value).__name__}")
    return value


def tokenise(
    examples: Examples, tokenizer: Any, *, cutoff: int, loss_on: Literal["all", "answers"]
) -> list[dict[str, list[int]]]:
    """``input_ids`` and ``labels`` of every example, at most ``cutoff`` tokens long.

    Each answer ends with the end-of-sequence token, so that the model learns to stop; what is cut off, ends
    without. With ``loss_on="answers"`` prompts get the label −100. Examples with nothing left to predict are
    left out; `DataError` when that is all of them.
    """
    rows = [_encode(turns, tokenizer, cutoff, loss_on) for turns in examples.rows]
    rows = [row for row in rows if any(label != IGNORED for label in row["labels"][1:])]
    if not rows:
        raise DataError(f"{examples.source}: no example has an answer within the first {cutoff} tokens")
    return rows


def _encode(turns: Sequence[Turn], tokenizer: Any, cutoff: int, loss_on: str) -> dict[str, list[int]]:
    if len(turns) > 1 and tokenizer.is_fast:
        return _encode_together(turns, tokenizer, cutoff, loss_on)
    ids: list[int] = []
    labels: list[int] = []
    for number, turn in enumerate(turns):
        special = number == 0
        prompt = _ids(tokenizer, turn.prompt, special) if turn.prompt else []
        piece = _ids(tokenizer, turn.prompt + turn.answer, special)
        # A token may straddle prompt and answer; it belongs to the answer, as generation has to produce it.
        answer_from = next((i for i, (a, b) in enumerate(zip(prompt, piece, strict=False)) if a != b), len(prompt))
        answer_from = min(answer_from, len(piece))
        if tokenizer.eos_token_id is not None and piece[-1:] != [tokenizer.eos_token_id]:
            piece.append(tokenizer.eos_token_id)
        ids += piece
        labels += piece if loss_on == "all" else [IGNORED] * answer_from + piece[answer_from:]
    return {"input_ids": ids[:cutoff], "labels": labels[:cutoff]}


def _encode_together(turns: Sequence[Turn], tokenizer: Any, cutoff: int, loss_on: str) -> dict[str, list[int]]:
    """A conversation tokenised as the one text that it is in use: some tokenizers begin a text differently from
    what follows a special token. A token is trained on when it has a character of an answer."""
    text = ""
    answers: list[tuple[int, int]] = []
    for turn in turns:
        piece = turn.prompt + turn.answer
        piece += "" if piece.endswith(tokenizer.eos_token or "") else tokenizer.eos_token
        answers.append((len(text) + len(turn.prompt), len(text) + len(piece)))
        text += piece
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    answered = [any(start < b and a < end for a, b in answers) for start, end in encoded["offset_mapping"]]
    labels = [token if loss_on == "all" or yes else IGNORED for token, yes in zip(ids, answered, strict=True)]
    return {"input_ids": ids[:cutoff], "labels": labels[:cutoff]}


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads a batch to its longest row, on the side that the tokenizer pads."""

    pad_token_id: int
    left: bool = False

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Tensors of shape (batch, longest): ``input_ids``, ``attention_mask``, ``labels``."""
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values: list[int], filler: int) -> list[int]:
            padding = [filler] * (longest - len(values))
            return padding + values if self.left else values + padding

        return {
            "input_ids": torch.tensor([padded(row["input_ids"], self.pad_token_id) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
            "labels": torch.tensor([padded(row["labels"], IGNORED) for row in rows]),
        }


def collator_for(tokenizer: Any) -> Collator:
    """The collator of a tokenizer. Padding is masked, so that a tokenizer without a pad token may use any
    other."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Collator(pad or 0, left=tokenizer.padding_side == "left")
