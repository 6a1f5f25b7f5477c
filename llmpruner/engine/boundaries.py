"""Hidden states between layers: in memory up to a limit, beyond it in a file without a name, gone with the process."""

from __future__ import annotations

import copy
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from ..files import writing

DEFAULT_LIMIT = 128 << 20
"""Bytes of hidden states in memory."""


class _Place(NamedTuple):
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Boundaries:
    """Keeps the tensors of several `States`, at most ``limit`` bytes in memory, the rest in a file in ``folder``."""

    def __init__(self, folder: Path | None = None, limit: int = DEFAULT_LIMIT) -> None:
        self._folder, self._limit = folder, limit
        self.in_memory = 0
        self._file: IO[bytes] | None = None
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        """Size in bytes → offsets of the file's unused places."""
        self._end = 0

    def keep(self, tensor: torch.Tensor) -> torch.Tensor | _Place:
        size = tensor.nbytes
        if self.in_memory + size <= self._limit:
            self.in_memory += size
            # A view would keep the tensor that it is a view of.
            return tensor if tensor.untyped_storage().nbytes() == size else tensor.clone()
        unused = self._free[size]
        offset = unused.pop() if unused else self._end
        self._end = max(self._end, offset + size)
        with writing(f"hidden states in a temporary file in '{self._folder or tempfile.gettempdir()}'"):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, prefix="llmpruner-")  # noqa: SIM115
            self._file.seek(offset)
            _write(self._file, tensor)
        return _Place(offset, tensor.shape, tensor.dtype, tensor.device)

    def read(self, kept: torch.Tensor | _Place) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        assert self._file is not None
        self._file.seek(kept.offset)
        return _read(self._file, kept.shape, kept.dtype).to(kept.device)

    def free(self, kept: torch.Tensor | _Place) -> None:
        if isinstance(kept, torch.Tensor):
            self.in_memory -= kept.nbytes
        else:
            self._free[kept.dtype.itemsize * kept.shape.numel()].append(kept.offset)


class States:
    """Tensors, one for each micro-batch; do not change them in place. ``passed``: what layers pass on besides."""

    def __init__(self, boundaries: Boundaries) -> None:
        self._boundaries = boundaries
        self._kept: list[torch.Tensor | _Place] = []
        self.passed: dict[tuple[int, str], Any] = {}

    def empty(self, *, apart: bool = False) -> States:
        """An empty sequence of the same `Boundaries`. ``apart``: with a copy of ``passed``, to run another model."""
        states = States(self._boundaries)
        states.passed = {place: copy.copy(v) for place, v in self.passed.items()} if apart else self.passed
        return states

    def __getitem__(self, number: int) -> torch.Tensor:
        return self._boundaries.read(self._kept[number])

    def __setitem__(self, number: int, tensor: torch.Tensor) -> None:
        self._boundaries.free(self._kept[number])
        self._kept[number] = self._boundaries.keep(tensor)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return map(self._boundaries.read, self._kept)

    def append(self, tensor: torch.Tensor) -> None:
        self._kept.append(self._boundaries.keep(tensor))

    def dump(self, file: Path) -> None:
        """Write all tensors to ``file``, whole or not at all."""
        aside = file.with_suffix(".partial")
        with aside.open("wb") as stream:
            for tensor in self:
                _write(stream, tensor)
        aside.replace(file)

    def loaded(self, file: Path) -> States:
        """The tensors that `dump` wrote, which have the shapes and dtypes of these."""
        states = self.empty()
        with file.open("rb") as stream:
            for like in self:
                states.append(_read(stream, like.shape, like.dtype).to(like.device))
        return states

    def clear(self) -> None:
        while self._kept:
            self._boundaries.free(self._kept.pop())

    __del__ = clear


def _bytes(tensor: torch.Tensor) -> Any:
    """The bytes of a contiguous tensor on the CPU, shared with it."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _read(file: IO[bytes], shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    if file.readinto(_bytes(tensor)) < tensor.nbytes:  # type: ignore[attr-defined]
        raise EOFError("the file of hidden states is shorter than it should be")
    return tensor


def _write(file: IO[bytes], tensor: torch.Tensor) -> None:
    file.write(_bytes(tensor.detach().cpu().contiguous()))
