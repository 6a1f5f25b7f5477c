"""Reading the tensors of a safetensors checkpoint by name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, first_line

if TYPE_CHECKING:
    import torch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class ShardFiles:
    """The tensors of ``model.safetensors``, or of the shards of ``model.safetensors.index.json``, in ``directory``.

    ``files``: tensor name → its file. Raises `CheckpointError` where an index or a shard is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index = directory / INDEX
        self.files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        if index.is_file():
            try:
                self.files = {
                    name: directory / file for name, file in json.loads(index.read_text())["weight_map"].items()
                }
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} is damaged: {first_line(error)}") from error
        else:
            single = directory / SINGLE
            with _opened(single) as file:
                self.files = dict.fromkeys(file.keys(), single)

    @staticmethod
    def are_in(directory: Path) -> bool:
        """Whether ``directory`` has weights in safetensors files."""
        return (directory / INDEX).is_file() or (directory / SINGLE).is_file()

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Name → tensor on the CPU, mapped from its file. Each call maps the file anew, so that its pages stop counting
        as memory of the process when the last of these tensors is freed. Changes in place do not reach the file."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        found: dict[str, torch.Tensor] = {}
        for path, wanted in by_file.items():
            with _opened(path) as file:
                for name in wanted:
                    try:
                        found[name] = file.get_tensor(name)
                    except (SafetensorError, RuntimeError, ValueError) as error:
                        raise CheckpointError(f"{path} is damaged, or lacks '{name}': {first_line(error)}") from error
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header of its file."""
        if not self._shapes:
            for path in set(self.files.values()):
                with _opened(path) as file:
                    names = file.keys()
                    self._shapes |= {found: tuple(file.get_slice(found).get_shape()) for found in names}
        try:
            return self._shapes[name]
        except KeyError:
            raise CheckpointError(f"{self.files[name]} is incomplete: it lacks the tensor '{name}'") from None

    def numbytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in set(self.files.values()))


def names_in(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file."""
    with _opened(file) as opened:
        return list(opened.keys())


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {first_line(error)}") from error
