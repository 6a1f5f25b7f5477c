"""The files of a checkpoint: safetensors, and the record ``llmpruner.json``, with size and SHA-256 of each file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, first_line
from ..files import WEIGHTS, read_json

RECORD_FILE = "llmpruner.json"
ORIGIN_FILE = "llmpruner-files.json"
"""Record of adapters and of exports for transformers, which `RECORD_FILE` would make pruned models."""
RUN_FILE = "run.json"
REPORT_FILE = "report.html"
RESULTS_FILE = "results.json"
"""In the folder of a recipe's step: what it measured."""
OF_THIS_MACHINE = (RUN_FILE, REPORT_FILE)
"""Files about the run that made a checkpoint. No result depends on them, and they are not published."""
INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"
HASHED = 1 << 30
"""Bytes of weights up to which loading compares hashes; of more, it compares sizes and names, and `verify` the rest."""
_SAMPLES, _SAMPLE = 64, 1 << 16


def read_record(path: str | Path) -> dict[str, Any] | None:
    """The JSON object in ``llmpruner.json``; None where there is no such file. Raises `CheckpointError`."""
    file = Path(path) / RECORD_FILE
    return read_json(file) if file.is_file() else None


def read_any_record(path: str | Path) -> dict[str, Any] | None:
    """The JSON object in ``llmpruner.json``, else in ``llmpruner-files.json``; None where neither is."""
    files = (Path(path) / RECORD_FILE, Path(path) / ORIGIN_FILE)
    return next((read_json(file) for file in files if file.is_file()), None)


def sha256(file: Path) -> str:
    """Of the content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def sampled_sha256(file: Path) -> str:
    """Of the size and 64 evenly spaced pieces of 64 KiB: tells two models apart without reading all weights."""
    size = file.stat().st_size
    digest, small = hashlib.sha256(str(size).encode()), size <= _SAMPLES * _SAMPLE
    with file.open("rb") as stream:
        for start in [0] if small else (n * (size - _SAMPLE) // (_SAMPLES - 1) for n in range(_SAMPLES)):
            stream.seek(start)
            digest.update(stream.read(size if small else _SAMPLE))
    return digest.hexdigest()


def write_record(record: Path, values: Mapping[str, Any]) -> None:
    """Write ``values`` as a record, with the size and the hash of every other file in its directory."""
    directory = record.parent
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file != record)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        facts = {
            file.relative_to(directory).as_posix(): {"bytes": file.stat().st_size, "sha256": digest}
            for file, digest in zip(files, pool.map(sha256, files), strict=True)
        }
    text = json.dumps({**values, "files": facts}, indent=1, allow_nan=False)
    record.write_text(text + "\n", encoding="utf-8")


def recorded_files(record: Mapping[str, Any] | None) -> dict[str, tuple[int, str]] | None:
    """Path → size and hash; None for a record of an earlier version, which has none. Raises `CheckpointError`."""
    if (entries := (record or {}).get("files")) is None:
        return None
    try:
        return {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError("the record is damaged: 'files' must give bytes and sha256 of each file") from error


def damaged_files(directory: Path, recorded: Mapping[str, tuple[int, str]], *, hashes: bool = True) -> Iterator[str]:
    """A line for each file that is missing, or whose size or, with ``hashes``, content has changed."""
    for name, (size, digest) in recorded.items():
        file = directory / name
        if not file.is_file():
            yield f"{file} is missing"
        elif file.stat().st_size != size:
            yield f"{file} has {file.stat().st_size:,} bytes, and had {size:,} when it was saved"
        elif hashes and sha256(file) != digest:
            yield f"{file} has another content than when it was saved (SHA-256 differs)"


def check_weights(directory: Path) -> None:
    """Raise `CheckpointError` for weights that were damaged after llmpruner wrote them, see `HASHED`."""
    if (record := read_any_record(directory)) is None:
        return  # indexes of other models are not always right
    recorded = recorded_files(record) or {}
    weights = {name: facts for name, facts in recorded.items() if Path(name).suffix in WEIGHTS}
    small = sum(size for size, _ in weights.values()) <= HASHED
    for line in damaged_files(directory, weights, hashes=small):
        raise CheckpointError(f"{line}; restore the file, or make the checkpoint again")
    check_index(directory)


def has_shards(directory: Path) -> bool:
    """Whether ``directory`` has its weights in safetensors files."""
    return (directory / INDEX_FILE).is_file() or (directory / WEIGHTS_FILE).is_file()


def names_in(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file. Raises `CheckpointError` for one that is missing or damaged."""
    # An import of numpy, which the command line does without until it reads weights.
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {first_line(error)}") from error


def check_index(directory: Path) -> None:
    """Raise `CheckpointError` for a safetensors file that is missing, damaged, or not as the index says."""
    if not (directory / INDEX_FILE).is_file():
        if (directory / WEIGHTS_FILE).is_file():
            names_in(directory / WEIGHTS_FILE)
        return
    files = read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{directory / INDEX_FILE} is damaged: it has no 'weight_map' of files")
    for file in sorted(set(files.values())):
        present, expected = set(names_in(directory / file)), {name for name, other in files.items() if other == file}
        for name in sorted(present ^ expected):
            what = "lacks" if name in expected else "has, besides those of the index,"
            raise CheckpointError(f"{directory / file} {what} the tensor '{name}'")
