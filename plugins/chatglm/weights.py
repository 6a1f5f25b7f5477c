"""Reading weights tensor by tensor from safetensors or ``.bin`` files, without running pickled code."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llmpruner import CheckpointError, ModelError

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_SHARD = re.compile(r".*-(\d{5})-of-(\d{5})\.(safetensors|bin)")

# Messages of torch's restricted unpickler for functions and classes, and for pickles that torch did not write.
_NOT_TENSORS = re.compile(r"unsupported (global|operand|class)|trying to (access|call)", re.IGNORECASE)

Tensors = Iterator[tuple[str, torch.Tensor]]


def weight_files(directory: Path) -> list[Path]:
    """The weight files, safetensors preferred to ``.bin``.

    Raises `ModelError` when there are none, `CheckpointError` when a shard is missing.
    """
    for single in _SINGLE:
        if (directory / single).is_file():
            return [directory / single]
        names = _indexed(directory / f"{single}.index.json") or _numbered(directory, Path(single).suffix)
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{directory}: {len(missing)} of {len(names)} weight files are missing, the first is {missing[0]}; "
                "download them again"
            )
        if names:
            return [directory / name for name in names]
    raise ModelError(f"{directory} holds no weights; expected {' or '.join(_SINGLE)}, whole or in shards")


def _indexed(index: Path) -> list[str]:
    if not index.is_file():
        return []
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} is damaged: it has no 'weight_map'")
    # Without directories, which may be outside the checkpoint.
    return sorted({Path(name).name for name in names.values()})


def _numbered(directory: Path, suffix: str) -> list[str]:
    """Names of all shards where there is no index, from the number in ``…-00001-of-00007.bin``."""
    found = [m for m in (_SHARD.fullmatch(p.name) for p in sorted(directory.glob(f"*{suffix}"))) if m]
    if not found:
        return []
    stem, total = found[0].group()[: found[0].start(1)], int(found[0][2])
    return [f"{stem}{n:05d}-of-{total:05d}{suffix}" for n in range(1, total + 1)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `CheckpointError` when the file is missing or holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: expected a JSON object, found {type(values).__name__}")
    return values


def read_tensors(file: Path) -> Tensors:
    """Name and tensor of everything in ``file``, one at a time; a tensor may be mapped from the file.

    Raises `CheckpointError` when the file is damaged, or contains anything but tensors.
    """
    return _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)


def _safetensors(file: Path) -> Tensors:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or truncated ({_line(error)}); download it again") from error


def _pickled(file: Path) -> Tensors:
    # Files from before torch 1.6 are plain pickles, which cannot be mapped.
    mapped = zipfile.is_zipfile(file)
    # A damaged pickle can raise anything.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and _NOT_TENSORS.search(str(error)):
            raise CheckpointError(
                f"{file} holds pickled code besides tensors, which is never run; use a safetensors version"
            ) from error
        raise CheckpointError(f"{file} is damaged or truncated ({_line(error)}); download it again") from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{file} holds a {type(tensors).__name__}; expected named tensors")
    for name in list(tensors):
        tensor = tensors.pop(name)
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{file}: '{name}' is a {type(tensor).__name__}; expected a tensor")
        yield name, tensor


Convert = Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]]
"""Stored name and tensor → the model's parameters that it holds, as views; none for what is not needed."""


def fill(config: PreTrainedConfig, directory: Path, convert: Convert, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model of ``config`` with the weights in ``directory``, each tensor read, converted and placed on its own.
    ``dtype``: None keeps what is stored. Raises `CheckpointError` when a parameter is missing, unknown or misshapen."""
    model = empty(config)
    released = ReleasedTensors(directory, model, convert, dtype)
    model.load_state_dict(released.read(released.names), strict=False, assign=True)
    model.tie_weights()
    kinds = {parameter.dtype for parameter in model.parameters()}
    if len(kinds) == 1:
        model.config.dtype = kinds.pop()
    return model.eval()


def empty(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of ``config`` without weights."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


class ReleasedTensors:
    """The weights in ``directory`` by the names of the parameters of ``model``.

    ``dtype``: None keeps what is stored. Creation reads names and shapes. It raises `CheckpointError` when a parameter
    is missing, unknown or misshapen, and when tied parameters differ.
    """

    def __init__(self, directory: Path, model: PreTrainedModel, convert: Convert, dtype: torch.dtype | None) -> None:
        self._convert, self._dtype = convert, dtype
        expected = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        self._places: dict[str, Path] = {}
        for file in weight_files(directory):
            for stored, tensor in read_tensors(file):
                for name, part in convert(stored, tensor):
                    if expected.get(name) != tuple(part.shape):
                        raise CheckpointError(
                            f"{file}: '{stored}' gives {name} {tuple(part.shape)}, the configuration has "
                            f"{expected.get(name, 'none of that name')}"
                        )
                    self._places[name] = file
        self._settle_ties(model, directory)
        missing = [name for name in expected if name not in self._places and name not in model.all_tied_weights_keys]
        if missing:
            raise CheckpointError(
                f"{directory}: {len(missing)} of {len(expected)} parameters are in none of the weight files, "
                f"the first is {missing[0]}; download them again"
            )

    @property
    def names(self) -> list[str]:
        """Of the parameters that are not tied to another one."""
        return list(self._places)

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Parameter → value, in memory of its own."""
        stored = {self._stored_as.get(name, name): name for name in names}
        found: dict[str, torch.Tensor] = {}
        for file in sorted({self._places[name] for name in names}):
            for stored_name, tensor in read_tensors(file):
                for name, part in self._convert(stored_name, tensor):
                    if name in stored:
                        found[stored[name]] = part.detach().to(self._dtype or part.dtype, copy=True)
        return found

    def _settle_ties(self, model: PreTrainedModel, directory: Path) -> None:
        """Checkpoints of tied models store one of the two, or both."""
        self._stored_as: dict[str, str] = {}
        for target, source in model.all_tied_weights_keys.items():
            if source not in self._places and target in self._places:
                self._places[source], self._stored_as[source] = self._places[target], target
            elif source in self._places and target in self._places:
                both = self.read([source, target])
                if not torch.equal(both[source], both[target]):
                    raise CheckpointError(
                        f"{directory}: {target} and {source} differ, but the configuration ties them; "
                        'set "tie_word_embeddings": false in config.json'
                    )
            self._places.pop(target, None)


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".:") if text else type(error).__name__
