"""The ``pytorch_model*.bin`` files of a checkpoint, mapped into memory; code in them never runs."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, first_line
from .converted import Conversion, ConvertedTensors
from .empty import meta_model
from .lazy import LazyModel, tied_differ
from .load import model_class
from .quiet import quiet_transformers
from .record import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

INDEX, SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"


def torch_files(directory: Path) -> list[Path]:
    """The ``.bin`` files with the weights in ``directory``; empty where there are none. Raises `CheckpointError` for a
    damaged index."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if not (directory / INDEX).is_file():
        return []
    stated = read_json(directory / INDEX).get("weight_map")
    if not isinstance(stated, dict) or not all(isinstance(name, str) for name in stated.values()):
        raise CheckpointError(f"{directory / INDEX} is damaged: it has no 'weight_map' of files")
    return [directory / Path(name).name for name in sorted(set(stated.values()))]


def can_be_mapped(files: Iterable[Path]) -> bool:
    """Whether PyTorch 1.6 or later wrote the files; earlier ones are read as a whole."""
    return all(zipfile.is_zipfile(file) for file in files)


def mapped(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.bin`` file, mapped anew. Raises `CheckpointError` for one that is missing or damaged, or that
    holds anything but tensors."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{file} is missing or damaged: {first_line(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise CheckpointError(f"{file} is no dictionary of tensors, as the weights of a model are")
    return found


class TorchTensors:
    """The `StoredTensors` of ``.bin`` files."""

    def __init__(self, files: Iterable[Path], conversion: Conversion) -> None:
        self._places = {name: file for file in files for name in mapped(file)}
        self.targets: Mapping[str, str] = conversion.targets(self._places)

    def state(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for file in sorted({self._places[name] for name in names}):
            tensors = mapped(file)
            found |= {name: tensors[name] for name in names if self._places[name] == file}
        return found


def lazy_torch(directory: Path, dtype: torch.dtype, layers: str, *, trust_remote_code: bool = False) -> LazyModel:
    """The model in the ``.bin`` files of ``directory``. ``layers``: path of the decoder layers. Raises
    `CheckpointError`, and what transformers raises."""
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    with quiet_transformers():
        # Names and shapes alone: everything is on the meta device.
        shell, info = model_class(directory, trust_remote_code).from_pretrained(
            str(directory), device_map={"": "meta"}, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    shell.tie_weights()  # transformers leaves two parameters where it has no values to compare
    model = meta_model(shell.config, dtype)
    model.generation_config = shell.generation_config
    conversion = Conversion(shell, dtype)
    stored = TorchTensors(torch_files(directory), conversion)
    _check_ties(directory, stored, conversion)
    source = ConvertedTensors(stored, conversion)
    source.give_buffers(model)
    return LazyModel(model, source, layers, info)


def _check_ties(directory: Path, stored: TorchTensors, conversion: Conversion) -> None:
    """Raise `CheckpointError` where parameters are tied by the configuration, and stored with different values."""
    by_target = {target: name for name, target in stored.targets.items()}
    for target, name in by_target.items():
        others = [by_target[other] for other in conversion.tied_to(target) if other in by_target and other > target]
        for other in others:
            found = stored.state([name, other])
            if found[name].data_ptr() != found[other].data_ptr() and not torch.equal(found[name], found[other]):
                raise tied_differ(directory, name, other)
