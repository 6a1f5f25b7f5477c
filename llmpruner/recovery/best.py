"""The weights with the lowest validation loss, kept in the folder of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..engine.ranks import Ranks
from ..files import writing
from ..models.shards import opened
from .sharded import whole_tensor


class BestWeights:
    """``folder``: where the files are. Only weights that are trained are kept. Methods must be called by all processes
    of a run."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._ranks = folder, Ranks.current()

    def keep(self, model: Any, step: int) -> None:
        """Write the weights after ``step``. Raises `OutputError` where the disk does not take them."""
        tensors = {}
        for name, parameter in _trained(model).items():
            value = whole_tensor(parameter)
            if self._ranks.first:
                tensors[name] = value.cpu().contiguous()
        self._ranks.from_first(lambda: self._write(tensors, self._file(step)))

    def restore(self, model: Any, step: int) -> None:
        """Give ``model``, whose parameters are whole, the weights after ``step``. Raises `CheckpointError` where their
        file is missing or damaged."""
        kept = {}
        if self._ranks.first:
            with opened(self._file(step)) as tensors:
                kept = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        with torch.no_grad():
            for name, parameter in _trained(model).items():
                if self._ranks.first:
                    parameter.copy_(kept[name])
                self._ranks.copy_from(0, [parameter.detach()])

    def drop_all_but(self, step: int | None) -> None:
        """Remove the files of other steps; with None, of all."""
        if self._ranks.first:
            for file in self._folder.glob(f"{_PREFIX}*"):
                if step is None or file != self._file(step):
                    file.unlink(missing_ok=True)

    def _file(self, step: int) -> Path:
        return self._folder / f"{_PREFIX}{step}.safetensors"

    def _write(self, tensors: dict[str, torch.Tensor], file: Path) -> None:
        aside = file.with_suffix(".partial")
        with writing(file):
            save_file(tensors, aside)
            aside.replace(file)


_PREFIX = "best-"


def _trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
