"""Reading records, documents and text from files and from data sets of the ``datasets`` library.

A *source* names a file: ``.jsonl`` (a JSON value a line), ``.json`` (a list of records, or one), ``.parquet`` (a record
a row), any other (one record, UTF-8 text); ``pydoc`` (the topics of Python's ``help()``, which differ between its
versions); or a data set: ``name``, ``name:config`` or ``name:config:split`` (default: the split ``train``). A file that
exists is read as a file. Several sources are one mixture: ``a.jsonl,b.jsonl``, or with shares ``3*a.jsonl,1*b.jsonl``.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from os.path import isdir, isfile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..errors import DataError, MissingExtraError, first_line

T = TypeVar("T")

PYDOC = "pydoc"
TEXT_FIELDS = ("text", "page", "content")
"""Fields for the text of a record; the first that is a string is used."""

EXPECTED_TEXT = f"expected a .txt, .json, .jsonl or .parquet file, the name of a data set, or '{PYDOC}'"
EXPECTED_EXAMPLES = "expected a .json, .jsonl or .parquet file, or the name of a data set"
"""What a source of text, and one of instructions, may be, for messages."""
_SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".parquet")
_DATASET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:.*)?", re.ASCII)
_PART = re.compile(r"(?:(\d+(?:\.\d+)?)\*)?(.+)", re.S)
_HALVES = re.compile(r"\\u[dD][89a-fA-F]")
"""Escapes in JSON for halves of a character. One alone, where a text was cut, is read as ?: tokenizers refuse it."""


class Record(NamedTuple):
    """``value``: a JSON value, or a table row as a dictionary. ``place``: as ``a.json, record 1``, for messages."""

    value: Any
    place: str


def read_records(source: str, expected: str = EXPECTED_TEXT) -> Iterator[Record]:
    """The records of a source, in order. Raises `DataError`: at once without a source, later for malformed records."""
    if source == PYDOC:
        from pydoc_data.topics import topics  # half a megabyte of text that --help does without

        return (Record(topics[name], f"{PYDOC}, topic '{name}'") for name in sorted(topics))
    if isdir(source) or source.endswith((".gguf", ".safetensors")):
        raise DataError(f"{source}: a folder or a model, and no text; {expected}")
    if isfile(source):
        path = Path(source)
        readers = {".jsonl": _json_lines, ".json": _json_records, ".parquet": _parquet_rows}
        return _readable(path, readers.get(path.suffix.lower(), _whole_text)(path))
    is_file_name = any(Path(piece).suffix.lower() in _SUFFIXES for piece in source.split(":"))  # as in chat:FILE
    if is_file_name or not _DATASET.fullmatch(source):
        raise DataError(f"{source or 'the source of data'}: no such file; {expected}")
    return _dataset_rows(source)


def _readable(path: Path, records: Iterator[Record]) -> Iterator[Record]:
    try:
        yield from records
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or first_line(error)}") from None


def read_documents(source: str) -> list[str]:
    """The text of every record that is not blank. Raises `DataError`, also for a record without text, and for none."""
    texts = [text for text in map(document, read_records(source)) if text.strip()]
    if not texts:
        raise DataError(f"{source} holds no text")
    return texts


def read_text(source: str) -> str:
    """All documents of a source as one text, with a blank line between them. Raises `DataError`."""
    return "\n\n".join(read_documents(source))


def document(record: Record) -> str:
    """The value of a record if that is a string, else the first string in `TEXT_FIELDS`. Raises `DataError`."""
    value = record.value
    if isinstance(value, str):
        return value
    fields = value if isinstance(value, Mapping) else {}
    for name in TEXT_FIELDS:
        if isinstance(text := fields.get(name), str):
            return text
    kinds = ", ".join(f"'{name}' ({type(field).__name__})" for name, field in fields.items()) or type(value).__name__
    talks = fields.keys() & {"instruction", "messages", "conversations", "prompt"}
    hint = "; as calibration, instructions and conversations are chat:FILE" if talks else ""
    expected = f"expected an object with one of the fields {', '.join(TEXT_FIELDS)} as a string"
    raise DataError(f"{record.place}: {expected}, found {kinds}{hint}")


def check_source(source: str, read: Callable[[Record], object] = document, expected: str = EXPECTED_TEXT) -> None:
    """Read a source with ``read`` up to the first record that is not blank, before long work starts. Raises
    `DataError`."""
    values = map(read, read_records(source, expected))
    if not any(value.strip() if isinstance(value, str) else True for value in values):
        raise DataError(f"{source} holds no {'text' if read is document else 'records'}")


def _whole_text(path: Path) -> Iterator[Record]:
    yield Record(_decoded(path.read_bytes(), str(path)).replace("\r\n", "\n").replace("\r", "\n"), str(path))


def _json_lines(path: Path) -> Iterator[Record]:
    # Lines of JSONL end with \n alone; str.splitlines would also split strings at U+2028 and others.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}, line {number}"
            if text := _decoded(line, place).strip(" \t\r\n"):
                yield Record(_parsed(text, path, number), place)


def _json_records(path: Path) -> Iterator[Record]:
    values = _parsed(_decoded(path.read_bytes(), str(path)), path)
    if not isinstance(values, list | dict):
        raise DataError(f"{path}: expected a JSON list of records, or one record, found {type(values).__name__}")
    for number, value in enumerate(values if isinstance(values, list) else [values], start=1):
        yield Record(value, f"{path}, record {number}")


def _parquet_rows(path: Path) -> Iterator[Record]:
    try:
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtraError("pyarrow", "recover") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            rows = (row for batch in table.iter_batches(1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield Record(row, f"{path}, row {number}")
    except (UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file: {first_line(error)}") from error


def _dataset_rows(source: str) -> Iterator[Record]:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "recover") from None
    name, config, split = [*source.split(":", 2), "", ""][:3]
    # datasets raises errors of many types: offline, no such name, gated, malformed.
    try:
        table = datasets.load_dataset(*filter(None, (name, config)), split=split or "train")
    except Exception as error:
        form = "name, name:config or name:config:split"
        message = f"'{source}' is no file here, and cannot be loaded as a data set ({form}): {first_line(error)}"
        raise DataError(message) from error
    for number, row in enumerate(table, start=1):
        yield Record(row, f"data set {source}, row {number}")


def _decoded(data: bytes, place: str) -> str:
    """UTF-8 text without a byte order mark. Zero bytes, which UTF-16 has, are refused too."""
    try:
        text, wrong = data.decode(), data.find(b"\0")
    except UnicodeDecodeError as error:
        text, wrong = "", error.start
    if wrong >= 0:
        raise DataError(f"{place}: not UTF-8 text (byte {wrong}); save it as UTF-8 text")
    return text.removeprefix("\ufeff")


def _parsed(text: str, path: Path, line: int = 1) -> Any:
    """The JSON value in ``text``, which begins at line ``line`` of the file."""
    try:
        value = json.loads(text)
        if _HALVES.search(text):
            value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
        return value
    except json.JSONDecodeError as error:
        several = path.suffix.lower() == ".json" and error.msg == "Extra data"
        hint = "; name it .jsonl if every line is a record" if several else ""
        raise DataError(f"{path}, line {line + error.lineno - 1}: not valid JSON ({error.msg}){hint}") from None


def parse_mixture(text: str) -> list[tuple[str, float | None]]:
    """The sources that ``text`` names, each with its share; None where no source has one, and all records are taken. A
    file that exists is one source, whatever its name. Raises `DataError` for an empty name and a share of zero."""
    if isfile(text):
        return [(text, None)]
    parts: list[tuple[str, float | None]] = []
    for piece in text.split(","):
        match = _PART.fullmatch(piece.strip())
        if match is None:
            raise DataError(f"'{text}' has a source with an empty name; expected SOURCE,SOURCE or 3*SOURCE,1*SOURCE")
        share = None if match[1] is None else float(match[1])
        if share == 0:
            raise DataError(f"'{text}': a share of 0 takes nothing of '{match[2]}'; leave it out")
        parts.append((match[2], share))
    if any(share is not None for _, share in parts):
        return [(source, 1.0 if share is None else share) for source, share in parts]
    return parts


def mixed(parts: Sequence[tuple[float | None, Sequence[T]]], seed: int) -> list[T]:
    """The records of all sources in order; with shares, as many as these proportions allow, drawn by ``seed``."""
    unit = min((len(records) / share for share, records in parts if share), default=0.0)
    chosen: list[T] = []
    for number, (share, records) in enumerate(parts):
        count = len(records) if share is None else max(1, round(share * unit))
        places = sorted(random.Random(f"{seed} {number}").sample(range(len(records)), min(count, len(records))))
        chosen += [records[place] for place in places]
    return chosen
