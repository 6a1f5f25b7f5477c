"""Writing checkpoints one tensor at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from llmpruner import OutputError

from .tensors import TensorSource, TensorSpec

SHARD_BYTES = 5_000_000_000
"""Maximum size of a weight file, as in transformers."""

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_safetensors(
    directory: Path, source: TensorSource, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write all tensors of ``source`` to ``directory`` as ``model*.safetensors``; ``dtype`` None: as stored.

    One tensor is in memory at a time, unlike with the library's own writer: the format is a header with the offsets,
    which are known beforehand, followed by the bytes.
    """
    specs = {name: TensorSpec(s.shape, dtype or s.dtype) for name, s in source.specs.items()}
    files = _split(specs, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        single = "model.safetensors"
        file = single if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        _write_file(directory / file, {name: specs[name] for name in names}, source)
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(map(_nbytes, specs.values()))}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _nbytes(spec: TensorSpec) -> int:
    return prod(spec.shape) * spec.dtype.itemsize


def _split(specs: Mapping[str, TensorSpec], limit: int) -> list[list[str]]:
    files: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if files[-1] and size + _nbytes(spec) > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += _nbytes(spec)
    return files


def _write_file(path: Path, specs: Mapping[str, TensorSpec], source: TensorSource) -> None:
    # In the order of element sizes, so that every tensor is aligned.
    names = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + _nbytes(specs[name])
        header[name] = {
            "dtype": _DTYPES[specs[name].dtype],
            "shape": specs[name].shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor = source.read(name).to(specs[name].dtype).contiguous()
            if tuple(tensor.shape) != specs[name].shape:
                raise OutputError(f"{name} has shape {tuple(tensor.shape)}; its file promised {specs[name].shape}")
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
