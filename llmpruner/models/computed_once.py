"""Values that take time to compute of what a checkpoint stores, computed once and mapped from files afterwards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file

from ..files import writing
from ..folders import scratch_folder

if TYPE_CHECKING:
    import torch

    from .source import TensorSource


class ComputedOnce:
    """The `TensorSource` of the values of ``source``, where the same ``names`` come together in every call. They are
    written when they are first read, into a temporary folder in ``beside``, which is removed with this object."""

    def __init__(self, source: TensorSource, beside: Path) -> None:
        self._source = source
        self._folder = scratch_folder(".llmpruner-converted-", beside)
        self._files: dict[frozenset[str], tuple[Path, dict[str, list[int]]]] = {}
        """Names of a call → the file with their values, and the order of axes that each has in it."""

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """See `TensorSource.read`. Raises `OutputError` where the values cannot be written."""
        key = frozenset(names)
        if key not in self._files:
            self._write(key, Path(self._folder.name) / f"{len(self._files)}.safetensors")
        file, orders = self._files[key]
        with safe_open(file, "pt") as stored:
            return {name: stored.get_tensor(name).permute(_inverse(orders[name])) for name in names}

    def _write(self, names: frozenset[str], file: Path) -> None:
        values = self._source.read(names)
        # Products depend on the order of axes in memory, and files have the tensors' own.
        orders = {name: _order(tensor.stride()) for name, tensor in values.items()}
        with writing(file):
            save_file({name: tensor.permute(orders[name]).contiguous() for name, tensor in values.items()}, file)
        self._files[names] = file, orders


def _order(strides: Sequence[int]) -> list[int]:
    """The axes, those with the largest strides first."""
    return sorted(range(len(strides)), key=lambda axis: -strides[axis])


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
