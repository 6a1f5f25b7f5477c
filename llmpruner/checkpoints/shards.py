"""The safetensors files of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, first_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def has_shards(directory: Path) -> bool:
    """Whether ``directory`` has weights in safetensors files."""
    return (directory / INDEX).is_file() or (directory / SINGLE).is_file()


def shard_bytes(directory: Path) -> int:
    """Bytes of all safetensors files in ``directory``."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def names_in(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file. Raises `CheckpointError` for one that is missing or damaged."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {first_line(error)}") from error
