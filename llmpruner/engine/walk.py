"""Run the decoder forwards, one layer at a time, over a calibration set."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedModel

from ..errors import LlmprunerError, ModelError, UnsupportedModelError, first_line
from ..models.numbers import autocast_to, computes_bfloat16_fast
from .boundaries import States
from .execution import TOKENS_AT_ONCE, Execution, LayerForm

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a layer, without the hidden states."""


@dataclass(frozen=True)
class CalibrationSet:
    """``input_ids``: int64, shape (samples, length), without padding. ``source``: the value of ``--calibration``.
    ``held_out``: further samples, which nothing is scored or fitted with, if they were drawn together."""

    input_ids: torch.Tensor
    source: str
    held_out: torch.Tensor | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the shape and the tokens, in hexadecimal digits."""
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        digest.update(self.input_ids.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def first(self, tokens: int) -> CalibrationSet:
        """The first samples, with at most ``tokens`` tokens in all; at least one sample."""
        return CalibrationSet(self.input_ids[: max(1, tokens // self.input_ids.shape[1])], self.source)


@dataclass
class ForwardWalk:
    """The decoder layers of a model, and the micro-batches that this process runs through them, maybe none."""

    execution: Execution
    layers: nn.ModuleList
    form: LayerForm
    firsts: Sequence[int]
    """Of each micro-batch, the number of its first sample in the calibration set."""
    calls: list[list[Call]]
    """Of each micro-batch, the arguments of each layer."""

    @classmethod
    @torch.no_grad()
    def over(cls, execution: Execution, calibration: CalibrationSet) -> tuple[ForwardWalk, States]:
        """The walk, and float32 hidden states (samples, length, hidden size) before layer 0. See `check_layers`."""
        model, layers = execution.model, execution.layers
        with execution.weights.outside():
            ids = calibration.input_ids.to(model.device)
            rows = max(1, TOKENS_AT_ONCE // ids.shape[1])
            firsts = execution.ranks.mine(range(0, len(ids), rows))
            form = check_layers(execution, calibration)
            states = States(execution.boundaries())
            calls: list[list[Call]] = []
            shapes: dict[torch.Size, list[Call]] = {}
            for first in firsts:
                part = ids[first : first + rows]
                of_part, hidden = record(model, layers, part, form.tuples)
                # As a rule they depend on the shape alone, and a long text has many micro-batches.
                like = shapes.setdefault(part.shape, of_part)
                calls.append(like if _same(like, of_part) else of_part)
                states.append(hidden.float())
        return cls(execution, layers, form, firsts, calls), states

    def advance(self, number: int, states: States) -> None:
        """Replace hidden states before layer ``number`` by those after it."""
        for position in range(len(self.calls)):
            states[position] = self.run(number, position, states)

    def run(self, number: int, position: int, states: States) -> torch.Tensor:
        """The hidden states of a micro-batch after layer ``number``, in float32. ``states``: those before it."""
        layer, hidden, (args, kwargs) = self.layers[number], states[position], self.calls[position][number]
        filled = {
            name: states.passed.setdefault((position, name), copy.copy(value))
            for name, value in kwargs.items()
            if _is_filled_by_layers(value)
        }
        dtype = self.form.autocast
        inputs = hidden if dtype is not None else hidden.to(self.execution.model.dtype)
        with autocast_to(hidden.device.type, dtype or inputs.dtype, enabled=dtype is not None), eager_experts(layer):
            return first_output(call_layer(layer, inputs, (args, {**kwargs, **filled}))).float()


def _is_filled_by_layers(value: Any) -> bool:
    """Whether it is a dictionary into which layers put what later ones read; still empty, as no layer was computed."""
    return isinstance(value, MutableMapping) and not value


def _same(a: Any, b: Any) -> bool:
    """Whether arguments of layers are equal."""
    (values, form), (others, other_form) = tree_flatten(a), tree_flatten(b)
    return form == other_form and all(map(_equal, values, others))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.dtype == b.dtype and torch.equal(a, b))
    return a is b or (type(a) is type(b) and isinstance(a, bool | int | float | str) and a == b)


@torch.no_grad()
def check_layers(execution: Execution, calibration: CalibrationSet) -> LayerForm:
    """Compare each layer alone with the whole model on 64 tokens of the text, once in a run. Raises `ModelError` for
    infinite states, and `UnsupportedModelError` for layers that fail alone, differ, or are not called in order."""
    model = execution.model
    if model not in execution.forms:
        with execution.weights.outside(), eager_experts(model):
            ids = calibration.input_ids[:1, :64].to(model.device)
            execution.forms[model] = _form(execution, ids)
    return execution.forms[model]


def _form(execution: Execution, ids: torch.Tensor) -> LayerForm:
    model, layers = execution.model, execution.layers
    before, outputs = _whole_run(model, layers, ids)
    after = [first_output(output) for output in outputs]
    if not bool(torch.isfinite(after[-1]).all()):
        raise ModelError("the hidden states of the calibration text are not finite numbers; the weights are damaged")
    for number in range(1, len(layers)):
        _compare(model, after[number - 1], before[number], number)
    tuples = [len(output) - 1 if isinstance(output, tuple | list) else None for output in outputs]
    calls, _ = record(model, layers, ids, tuples)
    passes_on = any(_is_filled_by_layers(value) for _, kwargs in calls for value in kwargs.values())
    # Layers that use keys of earlier ones (Gemma 3n) can't be tried: queries may get another dtype than these keys.
    shares_keys = bool(getattr(model.config.get_text_config(), "num_kv_shared_layers", 0))
    faster = computes_bfloat16_fast(model) and not shares_keys
    dtype = torch.bfloat16 if faster else model.dtype
    autocast = None if dtype == torch.float32 else dtype
    for number, (hidden, call) in enumerate(zip(before, calls, strict=True)):
        with execution.weights.layer(number):
            try:
                output = first_output(call_layer(layers[number], hidden, call))
            except LlmprunerError:
                raise
            except Exception as error:  # the whole model ran, so the layer lacks a value that another one provides
                raise _not_walkable(model, f"{type(error).__name__}: {first_line(error)}") from error
            _compare(model, output, after[number], number)
            if autocast is not None and not shares_keys:
                try:
                    with autocast_to(hidden.device.type, autocast):
                        call_layer(layers[number], hidden.float(), call)
                except Exception:  # the layer ran with hidden states in the dtype of the model
                    autocast = None
    return LayerForm(tuples, autocast, passes_on)


def _whole_run(
    model: PreTrainedModel, layers: nn.ModuleList, ids: torch.Tensor
) -> tuple[list[torch.Tensor], list[Any]]:
    """Hidden states before each layer, and its outputs."""
    ran: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = []
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_hook(lambda *run: ran.append(run), with_kwargs=True))
        model(input_ids=ids, use_cache=False)
    if [layer for layer, *_ in ran] != list(layers):
        raise _not_walkable(model, "they are not called once each, in order")
    return [hidden_of(args, kwargs) for _, args, kwargs, _ in ran], [output for *_, output in ran]


def _compare(model: PreTrainedModel, states: torch.Tensor, expected: torch.Tensor, number: int) -> None:
    """Half of the tokens must agree: others may be routed elsewhere by rounding; a missing value changes nearly all."""
    expected = expected.float()
    differences = (states.float() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)
    typical = float(differences.median())
    if not typical < 1e-3:
        reason = f"at layer {number}, hidden states differ by {typical:.2g} from those of the whole model"
        raise _not_walkable(model, reason)


def _not_walkable(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the layers of {type(model).__name__} pass other values than hidden states to one another, so they cannot be "
        f"run one by one ({reason}); use --importance l1, l2 or random and --set prune.compensate=none"
    )


class Stop(Exception):
    """Raised by hooks to end a forward pass early, before it computes values that are not needed."""


def record(
    model: PreTrainedModel, layers: nn.ModuleList, ids: torch.Tensor, tuples: Sequence[int | None]
) -> tuple[list[Call], torch.Tensor]:
    """The arguments of each layer, and the hidden states before the first; layers return these unchanged."""
    calls: list[Call] = []
    before: list[torch.Tensor] = []

    def forward(number: int, /, *args: Any, **kwargs: Any) -> Any:
        before.append(hidden := hidden_of(args, kwargs))
        calls.append((args[1:], kwargs))
        if len(calls) == len(layers):
            raise Stop
        return as_output(hidden, tuples[number])

    with replaced_layers(layers, forward), contextlib.suppress(Stop):
        model(input_ids=ids, use_cache=False)
    return calls, before[0]


@contextlib.contextmanager
def replaced_layers(layers: nn.ModuleList, replacement: Callable[..., Any]) -> Iterator[None]:
    """While active, ``replacement`` is called in place of each layer, with its number first."""
    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(layers):
            if "forward" in vars(layer):  # set on the instance by another library (accelerate)
                stack.callback(setattr, layer, "forward", layer.forward)
            else:
                stack.callback(delattr, layer, "forward")
            layer.forward = partial(replacement, number)
        yield


def call_layer(layer: nn.Module, hidden: torch.Tensor, call: Call) -> Any:
    args, kwargs = call
    if "hidden_states" in kwargs:
        return layer(*args, **{**kwargs, "hidden_states": hidden})
    return layer(hidden, *args, **kwargs)


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


def as_output(hidden: torch.Tensor, further: int | None) -> Any:
    """What a layer with so many ``further`` outputs returns, which nobody reads; None: it returns a bare tensor."""
    return hidden if further is None else (hidden, *[None] * further)


@contextlib.contextmanager
def eager_experts(module: nn.Module) -> Iterator[None]:
    """While active, experts are computed one by one: faster implementations hide their products, or copy weights."""
    with contextlib.ExitStack() as stack:
        for each in module.modules():
            config: Any = getattr(each, "config", None)
            if hasattr(config, "_experts_implementation"):
                stack.callback(setattr, config, "_experts_implementation_internal", config._experts_implementation)
                config._experts_implementation_internal = "eager"
        yield
