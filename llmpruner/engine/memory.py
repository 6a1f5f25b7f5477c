"""What the layers of a model take on this machine: bytes and seconds for each token, from a short run of the largest.

It runs with random weights, in the dtype, on the device and with the threads of the work to come. Nothing is read from
the checkpoint, and parameters outside the layer take no memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
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

_FLOPS, _FEW, _MANY = 2e10, 64, 2048
"""Operations of a timed run, and the tokens of the shorter and at most of the longer run."""
_WIDTH, _ROWS = 768, 1024
"""Of the matrix whose Gram matrix is timed."""


@dataclass(frozen=True)
class LayerSample:
    """Bytes for each token in a layer, forwards and with the backward pass; seconds in all layers, for a run of 64
    tokens and for each token of a long run; and operations (multiply and add: two) per second of Gram matrices."""

    forward_bytes: float
    backward_bytes: float
    few_seconds: float = 0.0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    rate: float = inf
    whole_logits: bool = False
    """Whether the model computes the logits of all positions even if it is asked for some."""


def sample_layer(
    config: PreTrainedConfig,
    path: str,
    counts: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    length: int,
    trained: Sequence[str],
    backward_tokens: int,
) -> LayerSample:
    """Run the largest layer. ``path``: of the list of layers; ``counts``: parameters of each. ``length``: tokens per
    sample at most; ``trained``: parameters that get gradients, of which those in other layers are left out;
    ``backward_tokens``: of a micro-batch in the backward pass, 0 without. Raises whatever a layer raises that can't be
    run outside its model."""
    number = counts.index(max(counts))
    prefix = f"{path}.{number}."
    model = meta_model(config, dtype)
    _fill(model, path, prefix, device)
    layers, mixed = decoder_list(model, path), computes_bfloat16_fast(model)
    parameters = [model.get_parameter(name) for name in trained if name.startswith(prefix)]
    vocabulary = model.get_input_embeddings().weight.shape[0]

    def prepared(tokens: int, *, backward: bool = False) -> Callable[[], None]:
        """A function that runs the layer over ``tokens`` tokens."""
        samples = max(tokens // length, 1)
        ids = torch.randint(min(vocabulary, 1000), (samples, tokens // samples), device=device)
        with torch.no_grad(), quiet_transformers():
            batch, hidden = record(model, layers, ids, [None] * len(layers))
        hidden = torch.randn_like(hidden)

        def run() -> None:
            inputs = hidden.clone().requires_grad_() if backward else hidden.float() if mixed else hidden
            with torch.set_grad_enabled(backward), torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                output = first_output(call_layer(layers[number], inputs, batch.calls[number]))
            if backward:
                torch.autograd.backward(output, torch.ones_like(output))
            for parameter in parameters:
                parameter.grad = None

        return run

    many = max(2 * _FEW, min(_MANY, int(_FLOPS / (2 * counts[number]))))
    tokens = min(many, backward_tokens or many)
    with eager_experts(expert_configs(model)):
        run_many = prepared(many)
        few, forward = _fastest(prepared(_FEW)), _fastest(run_many)
        with _Living() as living:
            run_many()
        forward_bytes = backward_bytes = living.most / many
        backward = 0.0
        if backward_tokens:
            for parameter in parameters:
                parameter.requires_grad_(True)
            run_back = prepared(tokens, backward=True)
            with _Living() as living:
                run_back()
            gradients = sum(parameter.nbytes for parameter in parameters)
            backward_bytes = max(forward_bytes, (living.most - gradients) / tokens)
            # Gradients of weights take the same time for any number of tokens.
            backward = _fastest(run_back) / tokens
    rows, square = torch.randn(_ROWS, _WIDTH, device=device), torch.zeros(_WIDTH, _WIDTH, device=device)
    all_layers = sum(counts) / counts[number]
    return LayerSample(
        forward_bytes,
        backward_bytes,
        few_seconds=all_layers * few,
        forward_seconds=all_layers * forward / many,
        backward_seconds=all_layers * backward,
        rate=gram_operations(_WIDTH) * _ROWS / _fastest(lambda: add_gram(square, rows)),
        whole_logits=not computes_some_logits(model),
    )


def gram_operations(width: int) -> float:
    """Operations of `add_gram` for one token: blocks on and below the diagonal, of four by four."""
    return 2 * width**2 * 10 / 16


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs after a first one, which take 20 ms together."""
    run()
    best, total = inf, 0.0
    while total < 0.02:
        started = time.perf_counter()
        run()
        took = time.perf_counter() - started
        best, total = min(best, took), total + took
    return best


def _fill(model: PreTrainedModel, path: str, prefix: str, device: torch.device) -> None:
    """Give the parameters of the layer below ``prefix`` random values, and those outside the layers views of one
    number."""
    filled: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.startswith(prefix):
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            values = values.normal_(0, 0.02) if parameter.dim() > 1 else values.fill_(1)
        elif name.startswith(f"{path}."):
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
