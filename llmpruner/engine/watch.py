"""Observing every matrix product with given weights, in any module.

Linear layers, transposed ones (GPT-2), and slices of a stacked expert parameter all call one of a few matrix product
functions of torch. Intercepting these finds the inputs of a parameter independently of module names and classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
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
"""Function → position and name of the arguments for the inputs and for the weight."""


@dataclass(frozen=True)
class WatchedProduct:
    """One product with a weight matrix. ``inputs``: (rows, d_in), ``outputs``: (rows, d_out), bias included; both
    detached, in the dtype of the product.

    They are the model's own tensors, which a later operator may overwrite (Falcon adds the outputs of attention to
    those of the MLP in place): read them while the product is observed, or keep what `copied` returns."""

    parameter: str
    axis: int
    """The axis of the parameter that is summed over: 1 of a linear weight, 0 of a transposed one."""
    slot: int | None
    """Number of the matrix in a stacked parameter (the expert); None where the parameter is one matrix."""
    inputs: torch.Tensor
    outputs: torch.Tensor
    bias: torch.Tensor | None
    """The bias that the product itself adds, (d_out,)."""
    result: torch.Tensor
    """The function's result with its autograd graph: the outputs in their original shape, or those of a whole stack."""
    part: int | None
    """Index of ``outputs`` in ``result``; None for all of it."""

    @property
    def leading_shape(self) -> tuple[int, ...]:
        """The original leading axes of ``outputs``, before they were flattened to rows."""
        return tuple(self.result.shape[:-1] if self.part is None else self.result.shape[1:-1])

    def copied(self) -> WatchedProduct:
        """The product with inputs and outputs of its own, to be read later; its ``result`` has no autograd graph."""
        inputs, outputs = (t.clone(memory_format=torch.contiguous_format) for t in (self.inputs, self.outputs))
        result = outputs.view(*self.leading_shape, outputs.shape[-1])
        return replace(self, inputs=inputs, outputs=outputs, result=result, part=None)

    def on_gradient(self, call: Callable[[torch.Tensor], None]) -> None:
        """Call ``call`` with the gradient with respect to ``outputs``, (rows, d_out), when backward computes it."""
        # The graph of ``result`` refers to the hook, which must not refer to ``result``: neither would be freed.
        part = self.part
        self.result.register_hook(lambda grad: call(_rows(grad if part is None else grad[part])))  # type: ignore[no-untyped-call]


Seen = Callable[[WatchedProduct], object]


class WatchProducts(TorchFunctionMode):
    """While active, calls ``seen`` for every product with one of the parameters ``names``. They are matched by storage,
    so that views are found too: a slice, a transpose, one expert of a stack. Products that ``seen`` computes are not
    observed."""

    def __init__(self, model: nn.Module, names: Iterable[str], seen: Seen) -> None:
        super().__init__()
        self._model = model
        self._seen: dict[str, list[Seen]] = {}
        self._by_storage: dict[int, list[tuple[str, torch.Tensor]]] = {}
        self.add(names, seen)

    def add(self, names: Iterable[str], seen: Seen) -> None:
        """Add an observer, which is called after those added earlier."""
        for name in names:
            if name not in self._seen:
                parameter = self._model.get_parameter(name)
                self._by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, parameter))
            self._seen.setdefault(name, []).append(seen)

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
                for product in _products(*found, weight, inputs, result, _bias(func, args, kwargs), transposed=linear):
                    for seen in self._seen[product.parameter]:
                        seen(product)
        return result

    def _owner(self, weight: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """The parameter that ``weight`` is a view of; several parameters may share a storage."""
        for name, parameter in self._by_storage.get(weight.untyped_storage().data_ptr(), ()):
            if 0 <= weight.storage_offset() - parameter.storage_offset() < parameter.numel():
                return name, parameter
        return None


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: tuple[int, str]) -> torch.Tensor:
    position, name = place
    argument: torch.Tensor = args[position] if len(args) > position else kwargs[name]
    return argument


def _products(
    name: str,
    parameter: torch.Tensor,
    weight: torch.Tensor,
    inputs: torch.Tensor,
    result: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    transposed: bool,
) -> Iterator[WatchedProduct]:
    if weight.dim() not in (2, parameter.dim()):
        return
    summed = weight.dim() - 1 if transposed else weight.dim() - 2
    # The view may be a transpose: its stride determines which axis of the parameter is summed over.
    axis = _axis_with(parameter, weight.stride(summed), weight.shape[summed])
    if axis is None:
        return
    first = int((weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0))
    if weight.dim() == 2:
        slot = first if parameter.dim() == 3 else None
        yield WatchedProduct(name, axis, slot, _rows(inputs), _rows(result), bias, result, None)
    elif weight.dim() == 3 and inputs.dim() <= 3:
        # The same inputs may be multiplied with every matrix of the stack.
        inputs = inputs.expand(len(weight), *inputs.shape[-2:])
        for part in range(len(weight)):
            yield WatchedProduct(name, axis, first + part, _rows(inputs[part]), _rows(result[part]), None, result, part)


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
