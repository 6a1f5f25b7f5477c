"""Reading the weights of released checkpoints, safetensors or ``.bin`` files, without running pickled code."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel

from llmpruner import CheckpointError, ModelError, meta_model

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_SHARD = re.compile(r".*-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_NOT_TENSORS = re.compile(r"unsupported (global|operand|class)|trying to (access|call)", re.IGNORECASE)
"""Messages of torch's restricted unpickler for functions and classes, and for pickles that torch did not write."""

Convert = Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]]
"""Stored name and tensor → the model's parameters that it holds; none for what is not needed."""


def read_model(config: PreTrainedConfig, directory: Path, convert: Convert, dtype: torch.dtype | None) -> Any:
    """A model of ``config`` with the weights in ``directory``. ``dtype``: None keeps what is stored. Raises
    `CheckpointError` when a parameter is missing, unknown or misshapen, and when tied parameters differ."""
    model = meta_model(config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(directory):
        for stored, tensor in _tensors(file).items():
            for name, part in convert(stored, tensor):
                if expected.get(name) != part.shape:
                    raise CheckpointError(
                        f"{file}: '{stored}' gives {name} {tuple(part.shape)}, the configuration has "
                        f"{tuple(expected[name]) if name in expected else 'none of that name'}"
                    )
                # A copy, as a part would keep the whole tensor in memory.
                state[name] = part.to(dtype or part.dtype, copy=True)
    _settle_ties(model, state, directory)
    missing = [name for name in expected if name not in state]
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} of {len(expected)} parameters are in none of the weight files, "
            f"the first is {missing[0]}; download them again"
        )
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    kinds = {parameter.dtype for parameter in model.parameters()}
    if len(kinds) == 1:
        model.config.dtype = kinds.pop()
    return model.eval()


def _settle_ties(model: PreTrainedModel, state: dict[str, torch.Tensor], directory: Path) -> None:
    """Checkpoints of tied models store one of the two, or both."""
    for target, source in model.all_tied_weights_keys.items():
        for name, other in ((source, target), (target, source)):
            if name not in state and other in state:
                state[name] = state[other]
        if source in state and not torch.equal(state[source], state[target]):
            raise CheckpointError(
                f"{directory}: {target} and {source} differ, but the configuration ties them; "
                'set "tie_word_embeddings": false in config.json'
            )


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
    names = read_json(index).get("weight_map", {}) if index.is_file() else {}
    # Without directories, which may be outside the checkpoint.
    return sorted({Path(name).name for name in names.values()})


def _numbered(directory: Path, suffix: str) -> list[str]:
    """Names of all shards where there is no index, from the number in ``…-00001-of-00007.bin``."""
    shards = [m for m in (_SHARD.fullmatch(p.name) for p in sorted(directory.glob(f"*{suffix}"))) if m]
    if not shards:
        return []
    stem, total = shards[0].group()[: shards[0].start(1)], int(shards[0][2])
    return [f"{stem}{n:05d}-of-{total:05d}{suffix}" for n in range(1, total + 1)]


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """Raises `CheckpointError` when the file is damaged, or contains anything but tensors."""
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged or truncated ({_line(error)}); download it again") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            # Files from before torch 1.6 are plain pickles.
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged pickle can raise anything
        if isinstance(error, pickle.UnpicklingError) and _NOT_TENSORS.search(str(error)):
            raise CheckpointError(
                f"{file} holds pickled code besides tensors, which is never run; use a safetensors version"
            ) from error
        raise CheckpointError(f"{file} is damaged or truncated ({_line(error)}); download it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{file} holds a {type(tensors).__name__}; expected named tensors")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `CheckpointError` when the file is missing or holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: expected a JSON object, found {type(values).__name__}")
    return values


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".:") if text else type(error).__name__
