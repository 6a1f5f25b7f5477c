"""What one layer of a model takes on this machine: bytes and seconds for each token, from a short run.

The largest layer runs with random weights, in the dtype, on the device and with the threads of the work to come.
Nothing is read from the checkpoint, and parameters outside the layer take no memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..models.messages import quiet_transformers
from ..models.meta import decoder_list, meta_model, put_parameters
from ..models.numbers import computes_bfloat16_fast
from ..models.positions import computes_some_logits
from .statistics import add_gram
from .walk import call_layer, eager_experts, expert_configs, first_output, record

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..structure.coupling import CouplingGraph

_FLOPS, _FEW, _MANY = 2e10, 64, 2048
"""Operations of a timed run, and the tokens of the shorter and at most of the longer run."""
_WIDTH, _ROWS = 768, 1024
"""Of the matrices whose sums and factors are timed."""


@dataclass(frozen=True)
class LayerSample:
    """What a layer with ``parameters`` parameters takes: bytes for each token, forwards and with the backward pass;
    seconds for each run and for each token of it. Rates of the machine: operations (multiply and add: two) per second
    of Gram matrices in float32, of ``solve`` in float64, of the ``head``; and bytes per second of ``copy``."""

    parameters: int
    forward_bytes: float
    backward_bytes: float
    run_seconds: float = 0.0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    gram: float = inf
    solve: float = inf
    head: float = inf
    copy: float = inf
    whole_logits: bool = False
    """Whether the model computes the logits of all positions even if it is asked for some."""

    @property
    def timed(self) -> bool:
        return self.forward_seconds > 0


def layer_parameters(graph: CouplingGraph) -> list[int]:
    """Number of parameters of each layer."""
    counts = [0] * graph.num_layers
    for name, shape in graph.shapes.items():
        number = graph.layer_of(name)
        if number is not None and name not in graph.ties:
            counts[number] += prod(shape)
    return counts


def guessed_layer(graph: CouplingGraph, hidden: int) -> LayerSample:
    """For a layer that is not run: float32 values of four times its hidden and its widest size for each token, and
    three times that for the backward pass."""
    counts = layer_parameters(graph)
    number = counts.index(max(counts))
    widest = max((shape[0] for name, shape in graph.shapes.items() if graph.layer_of(name) == number), default=0)
    each = 4 * (hidden + widest) * 4
    return LayerSample(counts[number], each, 3 * each)


def sample_layer(
    config: PreTrainedConfig,
    graph: CouplingGraph,
    dtype: torch.dtype,
    device: torch.device,
    length: int,
    trained: Sequence[str],
    backward_tokens: int,
) -> LayerSample:
    """Run the largest layer. ``length``: tokens per sample at most; ``trained``: parameters that get gradients, of
    which those in other layers are left out; ``backward_tokens``: of a micro-batch in the backward pass, 0 without.
    Raises whatever a layer raises that can't be run outside its model."""
    counts = layer_parameters(graph)
    number = counts.index(max(counts))
    prefix = f"{graph.layers}.{number}."
    model = meta_model(config, dtype)
    _fill(model, graph.layers, prefix, device)
    layers, experts, mixed = decoder_list(model, graph.layers), expert_configs(model), computes_bfloat16_fast(model)
    parameters = [model.get_parameter(name) for name in trained if name.startswith(prefix)]
    vocabulary = model.get_input_embeddings().weight.shape[0]

    def prepared(tokens: int) -> Callable[[bool], None]:
        """A function that runs the layer over ``tokens`` tokens, with a backward pass or without."""
        samples = max(tokens // length, 1)
        ids = torch.randint(min(vocabulary, 1000), (samples, tokens // samples), device=device)
        with torch.no_grad(), quiet_transformers():
            batch, hidden = record(model, layers, ids, [None] * len(layers))
        hidden = torch.randn_like(hidden)

        def run(backward: bool) -> None:
            for parameter in parameters if backward else ():
                parameter.requires_grad_(True)
            inputs = hidden.clone().requires_grad_() if backward else hidden.float() if mixed else hidden
            with torch.set_grad_enabled(backward), torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                output = first_output(call_layer(layers[number], inputs, batch.calls[number]))
            if backward:
                torch.autograd.backward(output, torch.ones_like(output))
            for parameter in parameters if backward else ():
                parameter.requires_grad_(False).grad = None

        return run

    many = max(2 * _FEW, min(_MANY, int(_FLOPS / (2 * counts[number]))))
    with eager_experts(experts):
        run_few, run_many = prepared(_FEW), prepared(many)
        few, forward = _fastest(partial(run_few, False)), _fastest(partial(run_many, False))
        with _Living() as in_forward:
            run_many(False)
        # Gradients of weights take the same time for any number of tokens.
        tokens = min(many, backward_tokens or many)
        run_back = partial(prepared(tokens), bool(backward_tokens))
        with _Living() as in_backward:
            run_back()
        backward = _fastest(run_back)
    slope = min(max(forward - few, 0.5 * forward) / (many - _FEW), forward / many)
    gradients = sum(parameter.nbytes for parameter in parameters)
    forward_bytes = in_forward.most / many
    return LayerSample(
        counts[number], forward_bytes, max(forward_bytes, (in_backward.most - gradients) / tokens),
        max(0.0, few - slope * _FEW), slope, backward / tokens,
        **_rates(torch.bfloat16 if mixed else dtype, device), whole_logits=not computes_some_logits(model),
    )  # fmt: skip


def gram_operations(width: int) -> float:
    """Operations of `add_gram` for one token: blocks on and below the diagonal, of four by four."""
    return 2 * width**2 * 10 / 16


def _fastest(run: Callable[[], object], least: float = 0.02) -> float:
    """Seconds of the fastest of some runs after a first one, which take ``least`` seconds together."""
    run()
    best, total = inf, 0.0
    while total < least:
        started = time.perf_counter()
        run()
        took = time.perf_counter() - started
        best, total = min(best, took), total + took
    return best


def _rates(head: torch.dtype, device: torch.device) -> dict[str, Any]:
    """``head``: dtype of the products of the head."""
    rows, square = torch.randn(_ROWS, _WIDTH, device=device), torch.zeros(_WIDTH, _WIDTH, device=device)
    add_gram(square, rows)
    spd = (square if device.type == "mps" else square.double()).tril()  # no float64 on Apple's GPUs
    spd = spd + spd.tril(-1).mT
    spd.diagonal().add_(_ROWS)
    weight, few, big = rows.repeat(4, 1).to(head), rows[:128].to(head), torch.empty(1 << 22)
    return {
        "gram": gram_operations(_WIDTH) * _ROWS / _fastest(lambda: add_gram(square, rows)),
        "solve": (_WIDTH**3 / 3 + 2 * _WIDTH**3) / _fastest(lambda: torch.linalg.cholesky(spd) @ spd),
        "head": 2 * 128 * weight.numel() / _fastest(lambda: few @ weight.T),
        "copy": big.nbytes / _fastest(big.clone),
    }


def _fill(model: PreTrainedModel, layers: str, prefix: str, device: torch.device) -> None:
    """Give the parameters of the layer below ``prefix`` random values, and those outside ``layers`` views of one
    number."""
    filled: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.startswith(prefix):
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            values = values.normal_(0, 0.02) if parameter.dim() > 1 else values.fill_(1)
        elif name.startswith(f"{layers}."):
            continue
        else:
            values = torch.full((), 0.02, dtype=parameter.dtype, device=device).expand(parameter.shape)
        filled[name] = nn.Parameter(values, requires_grad=False)
    put_parameters(model, filled)
    for module in model.modules():
        module._buffers.update({leaf: b if b is None else b.to(device) for leaf, b in module._buffers.items()})


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, follows the bytes of the tensors that operators create. ``most``: of those alive at one time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in taken:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}  # type: ignore[no-untyped-call]
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
