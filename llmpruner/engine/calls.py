"""Calling the layers of a decoder one by one: their arguments, as a run of the model gives them, and their outputs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a layer, without the hidden states."""


@dataclass
class Batch:
    """One micro-batch: token ids (samples, length), the arguments of each layer but the hidden states, and the number
    of its first sample in the calibration set."""

    input_ids: torch.Tensor
    calls: list[Call]
    first: int


def expert_configs(model: nn.Module) -> list[PreTrainedConfig]:
    configs = {id(c): c for m in model.modules() for c in (getattr(m, "config", None),) if c is not None}
    return [c for c in configs.values() if getattr(c, "_experts_implementation", None) not in (None, "eager")]


@contextlib.contextmanager
def eager_experts(configs: Sequence[PreTrainedConfig]) -> Iterator[None]:
    """While active, experts are computed one by one, so that `WatchProducts` observes a product for each: the faster
    implementations in transformers are a single operator, or copy the weights."""
    chosen = [config._experts_implementation_internal for config in configs]
    for config in configs:
        config._experts_implementation_internal = "eager"
    try:
        yield
    finally:
        for config, name in zip(configs, chosen, strict=True):
            config._experts_implementation_internal = name


def call_layer(layer: nn.Module, hidden: torch.Tensor, call: Call) -> Any:
    args, kwargs = call
    if "hidden_states" in kwargs:
        return layer(*args, **{**kwargs, "hidden_states": hidden})
    return layer(hidden, *args, **kwargs)


def with_passed(call: Call, passed: dict[str, Any]) -> Call:
    """``call`` with the dictionaries of ``passed`` in place of its own, of which copies are put there where it has none
    yet: layers put into them what later ones read."""
    args, kwargs = call
    named = {name: value for name, value in kwargs.items() if _is_filled_by_layers(value)}
    return args, {**kwargs, **{name: passed.setdefault(name, copy.copy(value)) for name, value in named.items()}}


def passes_on(calls: Sequence[Call]) -> bool:
    """Whether layers may pass on other values than hidden states, by dictionaries that they are called with."""
    return any(_is_filled_by_layers(value) for _, kwargs in calls for value in kwargs.values())


def _is_filled_by_layers(value: Any) -> bool:
    """Whether it is an empty dictionary: calls are recorded without computing a layer, so that one into which layers
    put values is still empty."""
    return isinstance(value, MutableMapping) and not value


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments of a layer. Raises `UnsupportedModelError` where there are none."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, torch.Tensor):
        raise UnsupportedModelError("a decoder layer is called without hidden states as its first argument")
    return hidden


def first_output(output: Any) -> torch.Tensor:
    tensor = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(tensor, torch.Tensor)
    return tensor


@contextlib.contextmanager
def replaced_layers(layers: nn.ModuleList, stub: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """While active, ``stub(number)`` replaces the forward of each layer."""
    # Other libraries (accelerate) set a forward on the instance.
    own = [vars(layer).get("forward") for layer in layers]
    for number, layer in enumerate(layers):
        layer.forward = stub(number)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def record(
    model: PreTrainedModel, layers: nn.ModuleList, ids: torch.Tensor, tuples: Sequence[int | None], first: int = 0
) -> tuple[Batch, torch.Tensor]:
    """Run the model with layers that return their hidden states unchanged, and record their other arguments. Returns
    them, and the hidden states before the first layer.

    ``tuples``: how many further values each layer returns, None for a bare tensor. ``first``: see `Batch`.
    """
    batch = Batch(ids, [], first)
    before: list[torch.Tensor] = []

    def stub(number: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = hidden_of(args, kwargs)
            if not before:
                before.append(hidden)
            batch.calls.append((args[1:], kwargs))
            further = tuples[number]
            return hidden if further is None else (hidden, *(None for _ in range(further)))

        return forward

    with replaced_layers(layers, stub), contextlib.suppress(Stop):
        handle = layers[-1].register_forward_hook(_stop)
        try:
            model(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
    return batch, before[0]


class Stop(Exception):
    """Raised by hooks to end a forward pass early, before it computes values that are not needed."""


def _stop(*_: Any) -> None:
    raise Stop


def not_walkable(model: PreTrainedModel, seen: str) -> UnsupportedModelError:
    """``seen``: what does not work when layers run one by one."""
    return UnsupportedModelError(
        f"the layers of {type(model).__name__} pass other values than hidden states to one another, so they cannot be "
        f"run one by one ({seen}); use --importance l1, l2 or random and --compensate none"
    )
