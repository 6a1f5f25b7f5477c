"""Seeing what every weight is multiplied with, wherever in the code that happens.

A linear layer, a transposed one (GPT-2), and the slices of a fused expert tensor all end in a handful of matrix
products. Watching these finds the inputs of a parameter without knowing a module's name or class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from torch import nn

_PRODUCTS: dict[Any, tuple[tuple[int, str], tuple[int, str]]] = {
    functional.linear: ((0, "input"), (1, "weight")),
    torch.matmul: ((0, "input"), (1, "other")),
    torch.Tensor.matmul: ((0, "self"), (1, "other")),
    torch.Tensor.__matmul__: ((0, "self"), (1, "other")),
    torch.mm: ((0, "input"), (1, "mat2")),
    torch.Tensor.mm: ((0, "self"), (1, "mat2")),
    torch.bmm: ((0, "input"), (1, "mat2")),
    torch.Tensor.bmm: ((0, "self"), (1, "mat2")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
    torch.baddbmm: ((1, "batch1"), (2, "batch2")),
}
"""Product → where its inputs and its weight stand among the arguments, and what they are called."""


@dataclass(frozen=True)
class Use:
    """One product of rows with a weight. ``inputs``: (rows, in), ``outputs``: (rows, out), bias included."""

    parameter: str
    axis: int
    """The axis of the parameter that is summed over: 1 of a linear weight, 0 of a transposed one."""
    slot: int | None
    """Which matrix of a stack of them (the expert); None where the parameter is one matrix."""
    inputs: torch.Tensor
    outputs: torch.Tensor
    bias: torch.Tensor | None = None
    """What the product itself adds, (out,)."""


class WatchUses(TorchFunctionMode):
    """While active, calls ``seen`` for every product with one of ``names``. Parameters are matched by storage, so
    views count: a slice, a transpose, one expert of many."""

    def __init__(self, model: nn.Module, names: Iterable[str], seen: Callable[[Use], None]) -> None:
        super().__init__()
        self._seen = seen
        self._by_storage: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name in names:
            parameter = model.get_parameter(name)
            self._by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, parameter))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        places = _PRODUCTS.get(func)
        if places is not None:
            inputs, weight = (_argument(args, kwargs, place) for place in places)
            found = self._owner(weight)
            if found is not None:
                linear = func is functional.linear
                for use in _uses(*found, weight, inputs, result, _bias(func, args, kwargs), transposed=linear):
                    self._seen(use)
        return result

    def _owner(self, weight: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """The parameter that ``weight`` is a view of. Several may lie in one storage."""
        for name, parameter in self._by_storage.get(weight.untyped_storage().data_ptr(), ()):
            if 0 <= weight.storage_offset() - parameter.storage_offset() < parameter.numel():
                return name, parameter
        return None


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: tuple[int, str]) -> torch.Tensor:
    position, name = place
    argument: torch.Tensor = args[position] if len(args) > position else kwargs[name]
    return argument


def _uses(
    name: str,
    parameter: torch.Tensor,
    weight: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    transposed: bool,
) -> Iterator[Use]:
    if weight.dim() not in (2, parameter.dim()):
        return
    summed = weight.dim() - 1 if transposed else weight.dim() - 2
    # The view may be a transpose: strides say which axis of the parameter is summed over.
    axis = _axis_with(parameter, weight.stride(summed), weight.shape[summed])
    if axis is None:
        return
    first = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
    if weight.dim() == 2:
        yield Use(name, axis, first if parameter.dim() == 3 else None, _rows(inputs), _rows(outputs), bias)
    elif weight.dim() == 3 and inputs.dim() <= 3:
        # One set of inputs may be meant for every matrix of the stack.
        inputs = inputs.expand(len(weight), *inputs.shape[-2:])
        for slot in range(len(weight)):
            yield Use(name, axis, first + slot, _rows(inputs[slot]), _rows(outputs[slot]))


def _bias(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    if func is functional.linear:
        return args[2] if len(args) > 2 else kwargs.get("bias")
    if func is torch.addmm:
        added = _argument(args, kwargs, (0, "input"))
        return added if added.dim() == 1 else None
    return None


def _axis_with(parameter: torch.Tensor, stride: int, size: int) -> int | None:
    axes = [a for a in range(parameter.dim()) if parameter.stride(a) == stride and parameter.shape[a] == size]
    return axes[-1] if axes else None


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().flatten(0, -2) if tensor.dim() > 1 else tensor.detach()[None]
