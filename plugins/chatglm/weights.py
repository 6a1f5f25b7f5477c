"""Reading the weights of released checkpoints, safetensors or ``.bin`` files, without running pickled code."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig

from llmpruner import CheckpointError, ModelError, meta_model

Convert = Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]]
"""Stored name and tensor → the model's parameters that it holds; none for what is not needed."""


def read_model(config: PreTrainedConfig, directory: Path, convert: Convert, dtype: torch.dtype | None) -> Any:
    """A model of ``config`` with the weights in ``directory``. ``dtype``: None keeps what is stored. Raises
    `CheckpointError` when a parameter is missing, unknown or misshapen, and when tied parameters differ."""
    model = meta_model(config)
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(directory):
        for stored, tensor in _tensors(file).items():
            for name, part in convert(stored, tensor):
                # A copy, as a part would keep the whole tensor in memory.
                state[name] = part.to(dtype or part.dtype, copy=True)
    for name, other in model.all_tied_weights_keys.items():
        # Checkpoints of tied models store one of the two, or both.
        for one, two in ((name, other), (other, name)):
            if two in state:
                state.setdefault(one, state[two])
        if name in state and not torch.equal(state[name], state[other]):
            raise CheckpointError(
                f"{directory}: {name} and {other} differ, but the configuration ties them; "
                'set "tie_word_embeddings": false in config.json'
            )
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # several lines, one for each parameter
        raise CheckpointError(f"{directory}: {' '.join(str(error).split())[:400]}; download it again") from error
    model.tie_weights()
    kinds = {parameter.dtype for parameter in model.parameters()}
    if len(kinds) == 1:
        model.config.dtype = kinds.pop()
    return model.eval()


def weight_files(directory: Path) -> list[Path]:
    """The weight files, safetensors preferred to ``.bin``. Raises `ModelError` when there are none, `CheckpointError`
    when a shard is missing."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{single}.index.json"
        if (directory / single).is_file():
            return [directory / single]
        if index.is_file():
            # Without directories, which may be outside the checkpoint.
            files = [directory / Path(name).name for name in sorted({*read_json(index).get("weight_map", {}).values()})]
            for file in files:
                if not file.is_file():
                    raise CheckpointError(f"{directory} lacks {file.name}, one of {len(files)} files; download it")
            return files
    raise ModelError(f"{directory} holds no weights; expected model.safetensors or pytorch_model.bin, or an index")


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """Raises `CheckpointError` when the file is damaged, or contains anything but tensors."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            # Files from before torch 1.6 are plain pickles.
            return {**torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))}
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{file} is damaged, or holds pickled code, which is never run; download it again, or a safetensors version"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `CheckpointError` when the file is missing or holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: expected a JSON object, found {type(values).__name__}")
    return values
