"""The safetensors files of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, first_line
from ..files import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WEIGHTS = {".safetensors", ".bin", ".gguf"}
"""Suffixes of files with weights."""


def has_shards(directory: Path) -> bool:
    """Whether ``directory`` has weights in safetensors files."""
    return (directory / INDEX).is_file() or (directory / SINGLE).is_file()


def names_in(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file. Raises `CheckpointError` for one that is missing or damaged."""
    with opened(file) as tensors:
        return list(tensors.keys())


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, mapped. Raises `CheckpointError`, which names it, where it is missing or damaged."""
    # Imports numpy, which the command line does without until it reads weights.
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {first_line(error)}") from error


def check_index(directory: Path) -> dict[str, str]:
    """Tensor → the safetensors file of ``directory`` that it is in; empty where there is none. Raises `CheckpointError`
    for a file that is missing or damaged, and for one with other tensors than the index says, as when two files were
    swapped."""
    if not (directory / INDEX).is_file():
        return dict.fromkeys(names_in(directory / SINGLE), SINGLE) if (directory / SINGLE).is_file() else {}
    stated = read_json(directory / INDEX).get("weight_map")
    if not isinstance(stated, dict) or not all(isinstance(file, str) for file in stated.values()):
        raise CheckpointError(f"{directory / INDEX} is damaged: it has no 'weight_map' of files")
    for file in sorted(set(stated.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{directory / INDEX} is damaged: '{file}' is no file of the checkpoint")
        found, expected = set(names_in(directory / file)), {name for name, place in stated.items() if place == file}
        for name in sorted(found ^ expected):
            what = "lacks" if name in expected else "has, which the index does not say,"
            raise CheckpointError(f"{directory / file} {what} the tensor '{name}'")
    return dict(stated)
