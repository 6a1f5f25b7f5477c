"""The files of a checkpoint as its record has them: size and SHA-256 of each, so that damage is seen and named.

Of safetensors files there is a CRC-32 for every tensor besides, which says where in the file the damage is.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .record import ORIGIN_FILE, RECORD_FILE, read_any_record, read_json, record_text
from .shards import WEIGHTS, check_index, places_in

FILES = "files"
"""The key of ``llmpruner.json``."""
HASHED = 1 << 30
"""Bytes of weights up to which their hashes are compared when a checkpoint is loaded; beyond, sizes and the names of
tensors are, and ``llmpruner verify`` compares the rest."""
_PIECE = 1 << 22
_SAMPLES, _SAMPLE = 64, 1 << 16


@dataclass(frozen=True)
class FileFacts:
    """``size``: in bytes. ``sha256``: of the content, as hexadecimal digits. ``crc32``: of each tensor's bytes, as
    hexadecimal digits; empty for what is no safetensors file."""

    size: int
    sha256: str
    crc32: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"bytes": self.size, "sha256": self.sha256}
        return {**found, "crc32": dict(self.crc32)} if self.crc32 else found


def facts_of(file: Path) -> FileFacts:
    """Reads the file once, in pieces. Raises `CheckpointError` for a safetensors file that is damaged."""
    digest, sums, size = hashlib.sha256(), {}, 0
    with file.open("rb") as stream:

        def read(end: int | None, checksum: int = 0) -> int:
            """Read up to ``end``; returns the CRC-32."""
            nonlocal size
            while end is None or size < end:
                piece = stream.read(_PIECE if end is None else min(_PIECE, end - size))
                if not piece:
                    break
                digest.update(piece)
                checksum, size = zlib.crc32(piece, checksum), size + len(piece)
            return checksum

        for name, begin, end in places_in(file) if file.suffix == ".safetensors" else ():
            read(begin)
            sums[name] = f"{read(end):08x}"
        read(None)
    return FileFacts(size, digest.hexdigest(), sums)


def sha256(file: Path) -> str:
    """Of the content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def sampled_sha256(file: Path) -> str:
    """Of the size and of 64 evenly spaced pieces of 64 KiB, of a smaller file of all of it: distinguishes files with
    weights of two models without reading them whole."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= _SAMPLES * _SAMPLE:
            digest.update(stream.read())
        else:
            for number in range(_SAMPLES):
                stream.seek(number * (size - _SAMPLE) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def add_manifest(directory: Path) -> None:
    """Put the facts of every other file of ``directory`` into its ``llmpruner.json``, if it has one."""
    record = directory / RECORD_FILE
    if record.is_file():
        _write(record, read_json(record))


def write_origin(directory: Path, origin: Mapping[str, Any]) -> None:
    """Write ``llmpruner-files.json``: ``origin``, JSON values, and the facts of every other file of ``directory``."""
    _write(directory / ORIGIN_FILE, origin)


def _write(record: Path, values: Mapping[str, Any]) -> None:
    directory = record.parent
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file != record)
    # Both sums are computed outside of the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        facts = {
            file.relative_to(directory).as_posix(): found.as_json()
            for file, found in zip(files, pool.map(facts_of, files), strict=True)
        }
    record.write_text(record_text({**values, FILES: facts}), encoding="utf-8")


def recorded_files(record: Mapping[str, Any] | None) -> dict[str, FileFacts] | None:
    """Path → facts, as ``record`` has them; None for a record without them, as earlier versions wrote it. Raises
    `CheckpointError` where they are malformed, or name files outside the checkpoint."""
    stated = None if record is None else record.get(FILES)
    if stated is None:
        return None
    try:
        found = {
            str(name): FileFacts(int(entry["bytes"]), str(entry["sha256"]), dict(entry.get("crc32") or {}))
            for name, entry in stated.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the record is damaged: '{FILES}' must give bytes and sha256 of each file") from error
    for name in found:
        if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"the record is damaged: {name!r} is no file of the checkpoint")
    return found


def damaged_files(
    directory: Path, recorded: Mapping[str, FileFacts], *, hashes: bool = True
) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) of the files that are not as ``recorded``: missing, of another size, or, with ``hashes``,
    of another content, with the name of the first tensor that differs."""
    for name, facts in recorded.items():
        file = directory / name
        if not file.is_file():
            yield name, "is missing"
        elif file.stat().st_size != facts.size:
            yield name, f"has {file.stat().st_size:,} bytes, and had {facts.size:,} when it was saved"
        elif hashes and sha256(file) != facts.sha256:
            yield name, f"has another content than when it was saved (SHA-256 differs){_where(file, facts)}"


def _where(file: Path, recorded: FileFacts) -> str:
    if not recorded.crc32:
        return ""
    try:
        now = facts_of(file).crc32
    except CheckpointError:
        return ": its header is damaged"
    changed = [tensor for tensor in recorded.crc32 if recorded.crc32[tensor] != now.get(tensor)]
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return f": tensor '{changed[0]}'{more}" if changed else ": its header"


def check_weights(directory: Path) -> None:
    """Check the weight files of a checkpoint or of adapters before they are loaded: sizes, tensor names in the index,
    and for up to `HASHED` bytes the content. Other files may be edited by hand. Raises `CheckpointError` that names the
    file."""
    recorded = recorded_files(read_any_record(directory))
    if recorded is not None:
        weights = {name: facts for name, facts in recorded.items() if Path(name).suffix in WEIGHTS}
        small = sum(facts.size for facts in weights.values()) <= HASHED
        for name, what in damaged_files(directory, weights, hashes=small):
            raise CheckpointError(f"{directory / name} {what}; restore the file, or make the checkpoint again")
    check_index(directory)
