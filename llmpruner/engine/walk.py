"""Running the decoder forwards, one layer at a time, over a calibration set.

The caller keeps the hidden states, and may pass those of the dense and of the pruned model through a layer. The other
arguments of each layer (masks, rotary tables) are recorded once, by running the model with layers that return their
inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import LlmprunerError, ModelError, UnsupportedModelError, first_line
from ..models.logits import last_logits
from ..models.precision import computes_bfloat16_fast
from .boundaries import States
from .executor import Executor

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

    from ..data.calibration import CalibrationSet
    from .ranks import Ranks


_TOLERANCE = 1e-3
"""Largest accepted relative difference of hidden states from those of the whole model, in the model's own precision."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a layer, without the hidden states."""


@dataclass
class Batch:
    """One micro-batch: token ids (samples, length), the arguments of each layer but the hidden states, and the number
    of its first sample in the calibration set."""

    input_ids: torch.Tensor
    calls: list[Call]
    first: int


@dataclass
class ForwardWalk:
    """The decoder layers of a model, and a calibration set in micro-batches to run through them.

    With several processes, ``batches`` and all hidden states are those of this one (`Ranks.mine`): maybe none, but the
    first process has the first.
    """

    executor: Executor
    layers: nn.ModuleList
    batches: list[Batch]
    embedded: States
    """Hidden states before the first layer, (samples, length, hidden size) in float32, one tensor for each
    micro-batch."""
    products: torch.dtype
    """The dtype of matrix products; hidden states are in float32."""
    experts: list[PreTrainedConfig]
    """Configurations that select the implementation of experts."""
    tokens: int
    """In the calibration set, of all processes."""
    tuples: list[int | None] = field(default_factory=list)
    """How many further values each layer returns, see `record`."""

    @property
    def ranks(self) -> Ranks:
        return self.executor.ranks

    @classmethod
    @torch.no_grad()
    def over(cls, executor: Executor, calibration: CalibrationSet) -> ForwardWalk:
        """Embed the calibration set. Raises `UnsupportedModelError` for a decoder whose layers pass on other values
        than hidden states, and `ModelError` for hidden states that are not finite."""
        ids = calibration.input_ids
        return cls.over_batches(executor, torch.split(ids, executor.rows_forward(ids.shape[1])))

    @classmethod
    @torch.no_grad()
    def over_batches(cls, executor: Executor, batches: Sequence[torch.Tensor]) -> ForwardWalk:
        """`over` for token ids in micro-batches (samples, length), int64, which may have different lengths."""
        model, layers = executor.model, executor.layers
        with executor.weights.outside():
            ids = [check_tokens(model, batch) for batch in batches]
            products = torch.bfloat16 if computes_bfloat16_fast(model) else model.dtype
            states, experts = executor.boundaries().states(), expert_configs(model)
            tokens = sum(map(torch.numel, ids))
            return cls(executor, layers, [], states, products, experts, tokens)._embed(ids)

    def _embed(self, ids: Sequence[torch.Tensor]) -> ForwardWalk:
        model, layers = self.executor.model, self.layers
        firsts = accumulate((len(batch) for batch in ids[:-1]), initial=0)
        shapes: dict[torch.Size, Batch] = {}
        with eager_experts(self.experts):
            self.tuples = tuples = _check(model, layers, ids[0][:1])
            for first, part in self.ranks.mine(list(zip(firsts, ids, strict=True))):
                batch, hidden = record(model, layers, part, tuples, first)
                # As a rule they depend on the shape alone, and a long text has many micro-batches.
                like = shapes.setdefault(part.shape, batch)
                if _same(like.calls, batch.calls):
                    batch.calls = like.calls
                self.batches.append(batch)
                self.embedded.append(hidden.float())
        return self

    def states(self) -> States:
        """An empty sequence for hidden states, beside the others of this walk."""
        return self.embedded.beside()

    def restored(self, file: Path) -> States:
        """Hidden states that `States.dump` wrote in a walk over the same calibration set."""
        found = self.states()
        if len(self.embedded):
            shapes, first = [hidden.shape for hidden in self.embedded], self.embedded[0]
            found.load(file, shapes, first.dtype, first.device)
        return found

    def layer(self, number: int) -> contextlib.AbstractContextManager[None]:
        """While active, the weights of a layer are in memory."""
        return self.executor.weights.layer(number)

    def advance(self, number: int, states: States) -> None:
        """Replace hidden states before layer ``number`` by those after it."""
        for position, batch in enumerate(self.batches):
            states[position] = self.run(number, batch, states[position])

    def run(self, number: int, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (samples, length, hidden size) after layer ``number``, in float32."""
        mixed = self.products != torch.float32
        with torch.autocast(hidden.device.type, self.products, enabled=mixed), eager_experts(self.experts):
            return first_output(call_layer(self.layers[number], hidden, batch.calls[number])).float()

    def logits(self, batch: Batch, row: int, hidden: torch.Tensor) -> torch.Tensor:
        """(length, vocabulary) in float32, for sample ``row`` of a micro-batch. ``hidden``: (length, hidden size), its
        hidden states after the last layer. Called while the weights outside the layers are in memory."""
        last = len(self.layers) - 1

        def stub(number: int) -> Callable[..., Any]:
            further = self.tuples[number]

            def forward(*args: Any, **kwargs: Any) -> Any:
                found = hidden[None] if number == last else hidden_of(args, kwargs)
                return found if further is None else (found, *(None for _ in range(further)))

            return forward

        mixed = self.products != torch.float32
        with replaced_layers(self.layers, stub), torch.autocast(hidden.device.type, self.products, enabled=mixed):
            found: torch.Tensor = self.executor.model(input_ids=batch.input_ids[row : row + 1], use_cache=False).logits
        return found[0].float()


def _check(model: PreTrainedModel, layers: nn.ModuleList, ids: torch.Tensor) -> list[int | None]:
    """Raises `UnsupportedModelError` unless running layer by layer gives the hidden states of the model on one sample.
    Returns the ``tuples`` of `record`. Computes in the model's own precision, as rounding may route a token to another
    expert, which would look like an error.
    """
    whole, tuples = run_whole(model, layers, ids)
    try:
        batch, hidden = record(model, layers, ids, tuples)
        for number, layer in enumerate(layers):
            hidden = first_output(call_layer(layer, hidden, batch.calls[number]))
    except LlmprunerError:
        raise
    except Exception as error:  # the whole model ran, so a layer lacks a value that another one provides
        raise not_walkable(model, f"{type(error).__name__}: {first_line(error)}") from error
    check_same(model, hidden, whole)
    return tuples


def run_whole(
    model: PreTrainedModel, layers: nn.ModuleList, ids: torch.Tensor
) -> tuple[torch.Tensor, list[int | None]]:
    """Run the whole model. Returns the hidden states after the last layer, and the ``tuples`` of
    `record`. Raises `ModelError` for states that are not finite, and `UnsupportedModelError` for layers that are not
    called one after the other."""
    called: list[int] = []
    outputs: list[Any] = []

    def keep(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            called.append(number)
            outputs.append(output)

        return hook

    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(keep(number)).remove)
        model(input_ids=ids, use_cache=False, **last_logits(model))
    if called != list(range(len(layers))):
        raise not_walkable(model, "they are not called once each, in order")
    whole = first_output(outputs[-1])
    if not bool(torch.isfinite(whole).all()):
        raise ModelError("the hidden states of the calibration text are not finite numbers; the weights are damaged")
    return whole, [len(out) - 1 if isinstance(out, tuple | list) else None for out in outputs]


def check_same(model: PreTrainedModel, hidden: torch.Tensor, whole: torch.Tensor) -> None:
    """Raises `UnsupportedModelError` unless ``hidden``, of a walk, equals ``whole``, of `run_whole`."""
    difference = float((hidden - whole).float().norm() / whole.float().norm().clamp_min(1e-12))
    if not difference < _TOLERANCE:
        raise not_walkable(model, f"hidden states differ by {difference:.2g} from those of the whole model")


def not_walkable(model: PreTrainedModel, seen: str) -> UnsupportedModelError:
    """``seen``: what does not work when layers run one by one."""
    return UnsupportedModelError(
        f"the layers of {type(model).__name__} pass other values than hidden states to one another, so they cannot be "
        f"run one by one ({seen}); use --importance taylor, l1, l2 or random and --compensate none"
    )


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


def check_tokens(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Token ids on the model's device. Raises `ModelError` when one is outside the vocabulary."""
    ids = ids.to(model.device)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= vocabulary:
        raise ModelError(f"token {int(ids.max())} is outside the model's vocabulary of {vocabulary}")
    return ids


def _same(one: Any, other: Any) -> bool:
    """Whether arguments of layers are equal."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool | int | float | str) and one == other


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
