"""Whether a model in memory is as it was: its modules, and the values of its tensors."""

from __future__ import annotations

from hashlib import blake2b
from itertools import chain
from typing import Any

import torch
from torch import nn


class Content:
    """What ``model`` contains now. Reads all of its weights twice, at the speed of memory."""

    def __init__(self, model: nn.Module) -> None:
        self._shape, self._sums = _shape(model), _sums(model)

    def is_in(self, model: nn.Module) -> bool:
        """Whether ``model`` is known to contain the same."""
        return self._sums is not None and self._shape == _shape(model) and self._sums == _sums(model)


_COLUMNS = 1024
"""Of the table in which the bytes of a tensor are laid out."""
_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)


def _shape(model: nn.Module) -> list[tuple[Any, ...]]:
    modules: list[tuple[Any, ...]] = [(path, type(module), module.training) for path, module in model.named_modules()]
    return modules + [(name, type(one), one.dtype, one.shape, one.device) for name, one in _tensors(model).items()]


def _sums(model: nn.Module) -> list[str] | None:
    """None for a model with tensors of other classes (sharded, quantised), whose bytes cannot be read alike."""
    tensors = [tensor for tensor in _tensors(model).values() if not tensor.is_meta]
    if any(type(tensor) not in _PLAIN for tensor in tensors):
        return None
    return [_sum(tensor.detach()) for tensor in tensors]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))


def _sum(tensor: torch.Tensor) -> str:
    """A digest of the sums of the rows and of the columns in which a tensor's bytes are laid out, eight at a time as
    whole numbers: exact, so that another value, and two values that change places, have other sums. torch's count of
    versions does not tell, as ``parameter.data`` is written without it."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    whole = flat.numel() // (8 * _COLUMNS) * 8 * _COLUMNS
    eights = flat[:whole] if flat.data_ptr() % 8 == flat.storage_offset() % 8 == 0 else flat[:whole].clone()
    table = eights.view(torch.int64).view(-1, _COLUMNS)
    digest = blake2b(digest_size=16)
    for part in (table.sum(0), table.sum(1), flat[whole:]):
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()
