"""Gradients of one layer at a time: those of autograd over the whole model, in the memory of one layer.

Hidden states between layers are kept, up to the execution's limit in memory; the backward pass runs each layer again.
Other inputs of a layer may have gradients too: keys and values of earlier layers, and what the model computes from
parameters outside the layers.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..errors import ModelError
from ..models.generation import logits_at, position_blocks
from ..models.numbers import autocast_to
from . import walk
from .boundaries import States
from .execution import TOKENS_WITH_GRADIENTS, Execution
from .products import ReduceProducts
from .signals import Signal
from .walk import CalibrationSet, Call

Argument = int | str
"""Position or name of an argument of a layer."""
Passed = tuple[Argument, Any, int]
"""Where a tensor is that layers pass on: name of the argument, a dictionary; key in it; number in the tuple there."""


@dataclass
class _Batch:
    """One micro-batch. ``share``: of the calibration set. ``calls``: the arguments of each layer."""

    input_ids: torch.Tensor
    share: float
    calls: list[Call] = field(default_factory=list)
    passed: dict[Passed, torch.Tensor] = field(default_factory=dict)
    """Gradients by later layers of what they took from dictionaries."""
    arguments: dict[int, dict[Argument, torch.Tensor]] = field(default_factory=dict)
    """Layer → gradients of the arguments that the model computes from parameters outside the layers."""


class GradientWalk:
    """The forward and backward pass over a calibration set. Each process runs its own micro-batches, maybe none;
    gradients are sums over all. Parameters must not require gradients. ``needs``: `Signal.GRAD_SQ` takes single
    samples; without gradients of parameters, bfloat16 is used where it is faster. ``outer``: of `backward_outer`."""

    def __init__(
        self, execution: Execution, calibration: CalibrationSet, needs: Collection[Signal], outer: Collection[str]
    ) -> None:
        self.model, self.layers, self.weights = execution.model, execution.layers, execution.weights
        self._ranks, self._progress = execution.ranks, execution.progress
        self._squares = Signal.GRAD_SQ in needs
        with self.weights.outside():
            ids = calibration.input_ids.to(self.model.device)
            self._tuples, autocast, _ = walk.check_layers(execution, calibration)
        exact = self._squares or Signal.GRAD in needs
        self._mixed = not exact and autocast not in (None, self.model.dtype)
        """Whether layers and head run under autocast."""
        rows = 1 if self._squares else max(1, TOKENS_WITH_GRADIENTS // ids.shape[1])
        self.batches = self._ranks.mine([_Batch(part, len(part) / len(ids)) for part in torch.split(ids, rows)])
        tokens = min(rows, len(ids)) * (ids.shape[1] - 1)
        self._scale = 2.0 ** tokens.bit_length() if self.model.dtype == torch.float16 else 1.0
        """By which the loss is multiplied: the gradient of a mean over many tokens is below what float16 can hold."""
        self._summed = self._squares or rows < len(ids) or self._ranks.count > 1 or self._scale != 1
        """Whether gradients are float32 sums: over micro-batches or processes, and where they are scaled."""
        kept = execution.boundaries()
        self.hidden = [States(kept) for _ in range(len(self.layers) + 1)]
        """Before each layer, and after the last: a tensor for each micro-batch."""
        self.grads = States(kept)
        """The gradient of the loss with respect to the hidden states after the layer that backward computes next."""
        self._outer = outer
        self._from_outer: list[Collection[Argument]] = [()] * len(self.layers)
        """Of each layer, the arguments that the model computes from ``outer`` parameters."""

    @torch.no_grad()
    def forward(self) -> None:
        """Run the model and its head. Raises `ModelError` when the loss is not finite."""
        loss = 0.0
        if self.batches:
            self._run_layers()
            with self.weights.outside():
                if self._outer:
                    with requiring_grad(map(self.model.get_parameter, self._outer)):
                        self._from_outer = [list(arguments) for arguments in self._inputs(0)[1]]
                for position, batch in enumerate(self.batches):
                    grad, of_batch = self._head(position)
                    self.grads.append(grad)
                    loss += batch.share * of_batch
        (loss,) = self._ranks.totals(loss)
        if not isfinite(loss):
            raise ModelError("the loss on the calibration text is not a finite number; the weights are damaged")

    def _run_layers(self) -> None:
        with self.weights.outside():
            for batch in self.batches:
                batch.calls, embedded = walk.record(self.model, self.layers, batch.input_ids, self._tuples)
                self.hidden[0].append(embedded)
        for number in self._progress.track(range(len(self.layers)), "Running the model"):
            layer = self.layers[number]
            with self.weights.layer(number), self._computing():
                for batch, hidden in zip(self.batches, self.hidden[number], strict=True):
                    call, batch.calls[number] = batch.calls[number], _with_own_dictionaries(batch.calls[number])
                    self.hidden[number + 1].append(walk.first_output(walk.call_layer(layer, hidden, call)))

    def backward_layer(
        self, number: int, names: Iterable[str], reduced: ReduceProducts | None
    ) -> dict[str, GradientSums]:
        """Gradients of the parameters ``names`` of a layer, from the last one on. ``reduced``: gets its products."""
        layer = self.layers[number]
        with self._summing(names) as sums:
            for position, batch in enumerate(self.batches):
                hidden = self.hidden[number][position].detach().requires_grad_()
                call, arguments = _with_leaves(batch.calls[number], self._from_outer[number])
                taken = dict(_passed(call))
                with torch.enable_grad(), self._computing(), contextlib.ExitStack() as watching:
                    if reduced is not None:
                        watching.enter_context(walk.eager_experts(layer))
                        watching.enter_context(reduced.watching(len(batch.input_ids) / self._scale))
                    first = walk.first_output(walk.call_layer(layer, hidden, call))
                # What this layer put into dictionaries, or took from them as later layers did.
                later = [(tensor, batch.passed.pop(at)) for at, tensor in _passed(call) if at in batch.passed]
                outputs, grads = zip((first, self.grads[position]), *later, strict=True)
                # Outside of the watch, which would also record products that a criterion computes.
                torch.autograd.backward(outputs, grads)
                assert hidden.grad is not None
                self.grads[position] = hidden.grad
                batch.passed |= _grads(taken)
                batch.arguments[number] = _grads(arguments)
                del first, outputs, later, call  # frees its graph before that of the next micro-batch is built
                self._add(batch, sums)
        if number + 1 < len(self.layers):
            # The head needs those after the last layer again.
            self.hidden[number + 1].clear()
        return sums

    def backward_outer(self) -> dict[str, GradientSums]:
        """Gradients of the ``outer`` parameters (embeddings, norm, head), after `backward_layer` of all layers."""
        with self._summing(self._outer) as sums:
            for position, batch in enumerate(self.batches):
                self._head(position)
                first, arguments = self._inputs(position)
                outputs = [(first, self.grads[position])] if first.requires_grad else []
                for number, tensors in enumerate(arguments):
                    grads = batch.arguments.get(number, {})
                    outputs += [(tensor, grads[name]) for name, tensor in tensors.items() if name in grads]
                if outputs:
                    torch.autograd.backward([tensor for tensor, _ in outputs], [grad for _, grad in outputs])
                self._add(batch, sums)
        return sums

    @contextlib.contextmanager
    def _summing(self, names: Iterable[str]) -> Iterator[dict[str, GradientSums]]:
        """While active, parameters require gradients, which are then summed over all processes."""
        parameters = {name: self.model.get_parameter(name) for name in names}
        sums = {n: GradientSums(p, summed=self._summed, squares=self._squares) for n, p in parameters.items()}
        with requiring_grad(parameters.values()):
            yield sums
        self._ranks.sum_(t for each in sums.values() for t in (each.grad, each.grad_sq) if t is not None)

    def _add(self, batch: _Batch, sums: Mapping[str, GradientSums]) -> None:
        for name, each in sums.items():
            each.add(self.model.get_parameter(name), batch.share, self._scale)

    def _computing(self) -> contextlib.AbstractContextManager[None]:
        return autocast_to(self.batches[0].input_ids.device.type, torch.bfloat16, enabled=self._mixed)

    def _head(self, position: int) -> tuple[torch.Tensor, float]:
        """Run the head with gradients, some positions at a time: the gradient of its input, and the mean loss."""
        batch = self.batches[position]
        last = self.hidden[-1][position].detach().requires_grad_()
        vocabulary, targets = self.model.get_input_embeddings().weight.shape[0], batch.input_ids[:, 1:]
        total = 0.0

        def forward(number: int, /, *args: Any, **kwargs: Any) -> Any:
            hidden = last if number == len(self.layers) - 1 else walk.hidden_of(args, kwargs)
            return walk.as_output(hidden, self._tuples[number])

        with walk.replaced_layers(self.layers, forward), torch.enable_grad(), self._computing():
            for positions in position_blocks(self.model, batch.input_ids, vocabulary):
                logits = logits_at(self.model, batch.input_ids, positions)
                logits = logits.float().flatten(0, 1)
                chosen = targets.index_select(1, positions).flatten()
                loss = functional.cross_entropy(logits, chosen, reduction="sum") / targets.numel()
                torch.autograd.backward(loss * self._scale)
                total += float(loss.detach())
        assert last.grad is not None
        return last.grad, total

    def _inputs(self, position: int) -> tuple[torch.Tensor, list[dict[Argument, torch.Tensor]]]:
        """With their autograd graphs: the hidden states before the first layer, and the other arguments of layers."""
        with torch.enable_grad():
            calls, first = walk.record(self.model, self.layers, self.batches[position].input_ids, self._tuples)
        return first, [{n: t for n, t in _tensors(call).items() if t.requires_grad} for call in calls]


class GradientSums:
    """Sums over micro-batches in float32: the gradient of the mean loss, and with ``squares`` the mean squared gradient
    of single samples. Without ``summed``, ``grad`` is that of the only micro-batch, in the dtype of the parameter."""

    def __init__(self, parameter: nn.Parameter, *, summed: bool, squares: bool) -> None:
        zeros = partial(torch.zeros, parameter.shape, dtype=torch.float32, device=parameter.device)
        self.grad: torch.Tensor | None = zeros() if summed else None
        self.grad_sq: torch.Tensor | None = zeros() if squares else None

    def add(self, parameter: nn.Parameter, share: float, scale: float) -> None:
        """Add ``parameter.grad``, and free it. ``share``: of the micro-batch; ``scale``: of its loss."""
        of_batch, parameter.grad = parameter.grad, None
        if self.grad is None:
            self.grad = torch.zeros_like(parameter) if of_batch is None else of_batch
        elif of_batch is not None:
            grad = of_batch.float() if scale == 1 else of_batch.float().div_(scale)
            self.grad.add_(grad, alpha=share)
            if self.grad_sq is not None:
                self.grad_sq.addcmul_(grad, grad, value=share)


@contextlib.contextmanager
def requiring_grad(parameters: Iterable[nn.Parameter], required: bool = True) -> Iterator[None]:
    """While active, ``parameters`` require gradients, or not."""
    with contextlib.ExitStack() as stack:
        for parameter in parameters:
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(required)
        yield


def _tensors(call: Call) -> dict[Argument, torch.Tensor]:
    """The tensors among the arguments, without hidden states."""
    args, kwargs = call
    named: list[tuple[Argument, Any]] = [*enumerate(args), *kwargs.items()]
    return {name: value for name, value in named if isinstance(value, torch.Tensor) and name != "hidden_states"}


def _with_leaves(call: Call, names: Collection[Argument]) -> tuple[Call, dict[Argument, torch.Tensor]]:
    """``call`` with tensors that collect gradients: in dictionaries, and as the arguments ``names``, also returned."""
    args, kwargs = _with_own_dictionaries(call)
    leaves = {name: _leaf(tensor) for name, tensor in _tensors(call).items() if name in names}
    for values in kwargs.values():
        if isinstance(values, MutableMapping):
            values.update({key: tuple(map(_leaf, entry)) for key, entry in values.items() if _is_floating(entry)})
    positional = tuple(leaves.get(number, value) for number, value in enumerate(args))
    return (positional, {name: leaves.get(name, value) for name, value in kwargs.items()}), leaves


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def _grads(leaves: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
    return {place: leaf.grad for place, leaf in leaves.items() if leaf.grad is not None}


def _with_own_dictionaries(call: Call) -> Call:
    """``call`` with copies of its dictionaries, into which later layers put nothing."""
    args, kwargs = call
    return args, {n: copy.copy(v) if isinstance(v, MutableMapping) else v for n, v in kwargs.items()}


def _passed(call: Call) -> Iterator[tuple[Passed, torch.Tensor]]:
    """The tensors in dictionaries, by which layers pass on keys and values."""
    for name, values in call[1].items():
        for key, entry in values.items() if isinstance(values, MutableMapping) else ():
            if _is_floating(entry):
                yield from (((name, key, number), tensor) for number, tensor in enumerate(entry))


def _is_floating(entry: Any) -> bool:
    return isinstance(entry, tuple) and all(isinstance(t, torch.Tensor) and t.is_floating_point() for t in entry)
