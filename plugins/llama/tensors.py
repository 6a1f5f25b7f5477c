"""Reading PyTorch and safetensors files one tensor at a time, mapped into memory, without unpickling code."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from llmpruner import CheckpointError

READ_BUDGET = 256 << 20
"""Bytes read before files are closed and opened again, as mapped pages count as resident memory until then."""
SMALL_BUDGET = 32 << 20
"""The same where one decoder layer is in memory at a time."""

_SAFETENSORS = ("model.safetensors.index.json", "model.safetensors")
_TORCH = ("pytorch_model.bin.index.json", "pytorch_model.bin")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorSource(Protocol):
    """A checkpoint with Hugging Face's parameter names, read one tensor at a time."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class _OpenFile:
    specs: Mapping[str, TensorSpec]
    read: Callable[[str], torch.Tensor]


class TensorFiles:
    """Checkpoint files, opened on first use. Methods raise `CheckpointError` for files that are damaged or contain
    anything but tensors. ``budget``: see `READ_BUDGET`."""

    def __init__(self, budget: int = READ_BUDGET) -> None:
        self._open: dict[Path, _OpenFile] = {}
        self._bytes, self._budget = 0, budget

    def specs(self, path: Path) -> Mapping[str, TensorSpec]:
        return self._file(path).specs

    def read(self, path: Path, name: str) -> torch.Tensor:
        """The tensor, which may be mapped from the file; keep no reference to it."""
        if self._bytes > self._budget:
            self.close()
        tensor = self._file(path).read(name)
        self._bytes += tensor.nbytes
        return tensor

    def close(self) -> None:
        """Let go of all files; they are opened again when they are read."""
        self._open.clear()
        self._bytes = 0

    def _file(self, path: Path) -> _OpenFile:
        if path not in self._open:
            self._open[path] = _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)
        return self._open[path]


def _open_torch(path: Path) -> _OpenFile:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is truncated, or not a checkpoint that PyTorch 1.6 or later wrote: download it again"
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds a pickle with more than tensors, which could run code: it was not loaded"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({_first_line(error)}): download it again") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointError(f"{path} is not a plain dictionary of tensors, as a model's weights are")
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return _OpenFile(specs, lambda name: cast("torch.Tensor", tensors[name].detach()))


def _open_safetensors(path: Path) -> _OpenFile:
    try:
        file = safe_open(path, "pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        specs = {n: TensorSpec(tuple(s.get_shape()), _DTYPES[s.get_dtype()]) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({_first_line(error)}): download it again") from error
    except KeyError as error:
        raise CheckpointError(f"{path} holds tensors of type {error}; expected 16-, 32- or 64-bit floats") from None
    return _OpenFile(specs, file.get_tensor)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class HuggingFaceTensors:
    """The weights of a Hugging Face directory: safetensors if it has them, else ``.bin`` files. Rotary tables, which
    old checkpoints store as buffers, are left out."""

    def __init__(self, directory: Path) -> None:
        self._files = TensorFiles()
        self._places = {n: p for n, p in self._locate(directory).items() if not n.endswith("rotary_emb.inv_freq")}
        missing = [name for name, path in self._places.items() if name not in self._files.specs(path)]
        if missing:
            raise CheckpointError(f"{self._places[missing[0]]} lacks {missing[0]}, which its index promises")
        self.specs: Mapping[str, TensorSpec] = {n: self._files.specs(p)[n] for n, p in self._places.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._files.read(self._places[name], name)

    def _locate(self, directory: Path) -> dict[str, Path]:
        for index, single in (_SAFETENSORS, _TORCH):
            if (directory / index).is_file():
                weight_map = read_json(directory / index).get("weight_map")
                if not isinstance(weight_map, dict):
                    raise CheckpointError(f"{directory / index} has no weight_map: it is damaged")
                places = {name: directory / str(file) for name, file in weight_map.items()}
                for path in sorted(set(places.values())):
                    if not path.is_file():
                        raise CheckpointError(f"{path} is missing; {index} lists it: download it")
                return places
            if (directory / single).is_file():
                path = directory / single
                return dict.fromkeys(self._files.specs(path), path)
        raise CheckpointError(f"{directory} holds no weights: expected model.safetensors or pytorch_model.bin")


class ModelTensors:
    """The weights of a model in memory."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._state = dict(model.named_parameters(remove_duplicate=False))
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self._state.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self._state[name].detach().cpu()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `CheckpointError` when the file is missing or malformed."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {_first_line(error)}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return values
