"""What layers take besides hidden states, in the backward pass of one layer at a time.

A layer may use what earlier ones put into a dictionary that all of them are called with (keys and values, in Gemma 3n),
and what the model computes from embeddings for every layer. Both are inputs of a layer with gradients of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, MutableMapping
from typing import Any

import torch

from .calls import Call

Place = tuple[str | int, ...]
"""Name or number of an argument of a layer; for a dictionary, also the key and the number of the tensor there."""


def as_now(call: Call) -> Call:
    """``call`` with copies of its dictionaries, into which later layers put nothing."""
    args, kwargs = call
    return args, {n: copy.copy(v) if isinstance(v, MutableMapping) else v for n, v in kwargs.items()}


def tensors_of(call: Call) -> dict[Place, torch.Tensor]:
    """The tensors among the arguments."""
    args, kwargs = call
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return {(name,): value for name, value in named if isinstance(value, torch.Tensor)}


class Inputs:
    """``call`` with tensors that collect gradients: those in dictionaries, and those at ``places``."""

    def __init__(self, call: Call, places: Collection[Place]) -> None:
        args, kwargs = as_now(call)
        self._own = {place: _leaf(tensor) for place, tensor in tensors_of(call).items() if place in places}
        for (name,), leaf in self._own.items():
            if isinstance(name, int):
                args = (*args[:name], leaf, *args[name + 1 :])
            else:
                kwargs[name] = leaf
        self.call: Call = args, kwargs
        for values in _dictionaries(self.call):
            for key, entry in values.items():
                if _is_floating(entry):
                    values[key] = tuple(map(_leaf, entry))
        self._taken = dict(_entries(self.call))

    def given(self, later: dict[Place, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """After the layer ran: what is in the dictionaries, with the gradients by ``later`` layers, which are taken out
        of it. Where the layer put nothing there, that is what it took, whose gradients are added to."""
        for place, tensor in _entries(self.call):
            if (grad := later.pop(place, None)) is not None:
                yield tensor, grad

    def collect(self, earlier: dict[Place, torch.Tensor], own: dict[Place, torch.Tensor]) -> None:
        """After the backward pass: the gradients of what the layer took from dictionaries, and of its own arguments."""
        earlier.update({place: leaf.grad for place, leaf in self._taken.items() if leaf.grad is not None})
        own.update({place: leaf.grad for place, leaf in self._own.items() if leaf.grad is not None})


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def _is_floating(entry: Any) -> bool:
    return isinstance(entry, tuple) and all(isinstance(t, torch.Tensor) and t.is_floating_point() for t in entry)


def _dictionaries(call: Call) -> Iterator[MutableMapping[Any, Any]]:
    return (value for value in call[1].values() if isinstance(value, MutableMapping))


def _entries(call: Call) -> Iterator[tuple[Place, torch.Tensor]]:
    for name, values in call[1].items():
        if isinstance(values, MutableMapping):
            for key, entry in values.items():
                if _is_floating(entry):
                    yield from (((name, key, number), tensor) for number, tensor in enumerate(entry))
