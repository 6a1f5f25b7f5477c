"""Reading records, documents and text from files and from data sets of the ``datasets`` library.

A *source* is a string that names one of

- a ``.jsonl`` file: one JSON value a line;
- a ``.json`` file: a list of records, or one record;
- a ``.parquet`` file: one record a row;
- any other text file (``.txt``, ``.md``, …): one record, a string;
- ``pydoc``: the topics of Python's ``help()``, one record each; they differ between Python versions;
- a data set: ``name``, ``name:config`` or ``name:config:split`` (default: the split ``train``).

A file that exists is read as a file, whatever its name. Text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError, MissingExtraError, first_line

PYDOC = "pydoc"
TEXT_FIELDS = ("text", "page", "content")
"""Fields for the text of a record; the first that is a string is used."""

EXPECTED_TEXT = f"expected a .txt, .json, .jsonl or .parquet file, the name of a data set, or '{PYDOC}'"
EXPECTED_EXAMPLES = "expected a .json, .jsonl or .parquet file, or the name of a data set"
"""What a source of text, and one of instructions, may be; for messages."""
SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".parquet")
"""What names of files with text or records end with."""
_DATASET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:.*)?", re.ASCII)
_PARQUET_ROWS = 1024
"""Rows of a Parquet file that are converted to Python objects at once."""


class Record(NamedTuple):
    """One record of a source. ``value``: a string, a JSON value, or a table row as a dictionary. ``place``: the file
    with line, record or row, counted from 1, for messages."""

    value: Any
    place: str


def read_records(source: str, expected: str = EXPECTED_TEXT) -> Iterator[Record]:
    """Iterates over the records of a source, in order. ``expected``: what the message for a source that does not exist
    says.

    Raises `DataError`: for a source that does not exist, at once; for a malformed record, when it is reached. Raises
    `MissingExtraError` where the library that reads the source is not installed.
    """
    if source == PYDOC:
        return _help_topics()
    path = _existing_file(source, expected)
    if path is None:
        return _dataset_rows(source)
    readers = {".jsonl": _json_lines, ".json": _json_records, ".parquet": _parquet_rows}
    return readers.get(path.suffix.lower(), _whole_text)(path)


def read_documents(source: str) -> list[str]:
    """The text of every record (see `document`) except blank ones. Raises as `read_records`, and `DataError` when
    a record has no text or all are blank."""
    texts = [text for text in map(document, read_records(source)) if text.strip()]
    if not texts:
        raise DataError(f"{source} holds no text")
    return texts


def read_text(source: str) -> str:
    """All documents of a source as one text, with a blank line between them. Raises as `read_documents`."""
    return "\n\n".join(read_documents(source))


def shortened(names: Sequence[str]) -> dict[str, str]:
    """Each name → as many of its last parts as distinguish it from the others: ``a/text.txt`` and ``b/text.txt`` are
    themselves, ``a/one.txt`` and ``a/two.txt`` are ``one.txt`` and ``two.txt``."""
    parts = {name: Path(name).parts or (name,) for name in names}

    def short(name: str) -> str:
        own = parts[name]
        for count in range(1, len(own)):
            if sum(other[-count:] == own[-count:] for other in parts.values()) == 1:
                return str(Path(*own[-count:]))
        return name

    return {name: short(name) for name in names}


def document(record: Record) -> str:
    """The text of one record: its value if that is a string, else the first string in `TEXT_FIELDS`. Raises
    `DataError`."""
    value = record.value
    if isinstance(value, str):
        return value
    fields = value if isinstance(value, Mapping) else {}
    for name in TEXT_FIELDS:
        if isinstance(text := fields.get(name), str):
            return text
    kinds = ", ".join(f"'{name}' ({type(field).__name__})" for name, field in fields.items()) or type(value).__name__
    raise DataError(
        f"{record.place}: expected an object with one of the fields {', '.join(TEXT_FIELDS)} as a string, found {kinds}"
    )


def check_source(source: str, read: Callable[[Record], object] = document, expected: str = EXPECTED_TEXT) -> None:
    """Find errors in a source before long work starts.

    ``read``: the function that the caller will apply to every record; it is applied to the first. ``expected``: see
    `read_records`. For a data set, only checks that ``datasets`` is installed, as it may have to be downloaded. Raises
    as `read_records` and ``read`` do, and `DataError` when there is no record.
    """
    if source != PYDOC and _existing_file(source, expected) is None:
        if find_spec("datasets") is None:
            raise MissingExtraError("datasets", "recover")
        return
    first = next(read_records(source, expected), None)
    if first is None:
        raise DataError(f"{source} holds no records")
    read(first)


def _existing_file(source: str, expected: str) -> Path | None:
    """The file that ``source`` names; None for a name of a data set. Raises `DataError` with what was
    ``expected`` for anything else."""
    if not source.strip():
        raise DataError(f"the source of data has an empty name; {expected}")
    path = Path(source)
    try:
        if path.is_file():
            return path
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"{source!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if is_directory:
        raise DataError(f"{source} is a directory; {expected}")
    if exists:
        raise DataError(f"{source} is not a regular file; copy its content to a file first")
    name = source.partition(":")[0]
    if Path(name).suffix.lower() in SUFFIXES or not _DATASET.fullmatch(source):
        raise DataError(f"{source}: no such file; {expected}")
    return None


def _help_topics() -> Iterator[Record]:
    from pydoc_data.topics import topics  # half a megabyte of text that --help does without

    for name in sorted(topics):
        yield Record(topics[name], f"{PYDOC}, topic '{name}'")


def _whole_text(path: Path) -> Iterator[Record]:
    yield Record(_decoded(_bytes(path), str(path)).replace("\r\n", "\n").replace("\r", "\n"), str(path))


def _json_lines(path: Path) -> Iterator[Record]:
    try:
        # Lines of JSONL end with \n alone; str.splitlines would also split strings at U+2028 and others.
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                place = f"{path}, line {number}"
                text = _decoded(line, place).strip(" \t\r\n")
                if text:
                    yield Record(_parsed(text, path, number), place)
    except OSError as error:
        raise _unreadable(path, error) from None


def _json_records(path: Path) -> Iterator[Record]:
    text = _decoded(_bytes(path), str(path))
    values = _parsed(text, path)
    if not isinstance(values, list | dict):
        raise DataError(f"{path}: expected a JSON list of records, or one record, found {type(values).__name__}")
    for number, value in enumerate(values if isinstance(values, list) else [values], start=1):
        yield Record(value, f"{path}, record {number}")


def _parquet_rows(path: Path) -> Iterator[Record]:
    try:
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtraError("pyarrow", "recover") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(row, f"{path}, row {number}")
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}, after row {number}: not a readable Parquet file: {first_line(error)}") from error


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
        raise DataError(
            f"'{source}' is no file here, and cannot be loaded as a data set (name, name:config or "
            f"name:config:split): {first_line(error)}"
        ) from error
    for number, row in enumerate(table, start=1):
        yield Record(row, f"data set {source}, row {number}")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}")


def _decoded(data: bytes, place: str) -> str:
    """UTF-8 text without a byte order mark. Raises `DataError`, also for zero bytes, which UTF-16 has."""
    try:
        text, wrong = data.decode(), data.find(b"\0")
    except UnicodeDecodeError as error:
        text, wrong = "", error.start
    if wrong >= 0:
        raise DataError(f"{place}: not UTF-8 text (byte {wrong}); save it as UTF-8 text")
    return text.removeprefix("\ufeff")


def _parsed(text: str, path: Path, line: int = 1) -> Any:
    """The JSON value in ``text``, which begins at line ``line`` of the file. Raises `DataError`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        several = path.suffix.lower() == ".json" and error.msg == "Extra data"
        hint = "; name it .jsonl if every line is a record" if several else ""
        raise DataError(f"{path}, line {line + error.lineno - 1}: not valid JSON ({error.msg}){hint}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {line}: JSON beyond what Python reads: {first_line(error)}") from None
