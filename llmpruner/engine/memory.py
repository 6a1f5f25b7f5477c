"""What the machine has, and what one layer of a model takes on it: a short run with random weights, timed.

The largest layer runs in the dtype, on the device and with the threads of the work to come; nothing is read from the
checkpoint. The parameters outside the layers are views of one number, which take no memory.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, prod
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..models.messages import quiet_transformers
from ..models.meta import decoder_list, meta_model
from ..models.numbers import computes_bfloat16_fast
from ..models.positions import computes_some_logits
from .statistics import add_gram
from .walk import call_layer, eager_experts, expert_configs, first_output, record

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..structure.coupling import CouplingGraph

GIB = 1 << 30
MODULES = 96 << 20
"""Bytes of modules that are imported during the work, of the tokenizer, and of the allocator's free lists."""
_FLOPS, _FEW, _MANY = 2e10, 64, 2048
"""Operations of a timed run, and the tokens of the shorter and at most of the longer one."""
_WIDTH, _ROWS = 768, 1024
"""Of the matrices whose sums and factors are timed."""


@dataclass(frozen=True)
class LayerSample:
    """What a layer with ``parameters`` parameters takes: seconds for each run and for each token of it, forwards and
    with the backward pass, and bytes for each token. Rates of the machine: operations (multiply and add: two) per
    second of Gram matrices in float32, of ``solve`` in float64, of the ``head``; and bytes per second of ``copy``."""

    parameters: int
    run_seconds: float
    forward_seconds: float
    backward_seconds: float
    forward_bytes: float
    backward_bytes: float
    gram: float
    solve: float
    head: float
    copy: float
    whole_logits: bool
    """Whether the model computes the logits of all positions even if it is asked for some."""


def machine_memory() -> int:
    """Bytes of memory of this machine, free or not, with what it swaps to."""
    return int(psutil.virtual_memory().total + psutil.swap_memory().total)


def free_memory() -> int:
    """Bytes of memory that programs can still take."""
    return int(psutil.virtual_memory().available)


def memory_before(loaded: nn.Module | None) -> int:
    """Bytes that this process has now, without the weights of a model that is ``loaded``."""
    gc.collect()
    resident: int = psutil.Process().memory_info().rss
    return resident if loaded is None else max(0, resident - sum(p.nbytes for p in loaded.parameters()))


def size_text(number: float) -> str:
    """``1.2 GiB``, ``340 MiB`` or ``1,000 bytes``."""
    if 0 < number < 1 << 20:
        return f"{number:,.0f} bytes"
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / (1 << 20):.0f} MiB"


def duration(seconds: float) -> str:
    """``40 s``, ``3 min`` or ``2.5 h``."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def layer_parameters(graph: CouplingGraph) -> list[int]:
    """Number of parameters of each layer."""
    counts = [0] * graph.num_layers
    for name, shape in graph.shapes.items():
        number = graph.layer_of(name)
        if number is not None and name not in graph.ties:
            counts[number] += prod(shape)
    return counts


def sample_layer(
    config: PreTrainedConfig,
    graph: CouplingGraph,
    dtype: torch.dtype,
    device: torch.device,
    length: int,
    trained: Sequence[str],
) -> LayerSample:
    """Run the largest layer. ``length``: tokens per sample at most; ``trained``: the parameters that get gradients, of
    which those of other layers are left out; none: no backward pass. Raises whatever a layer raises that cannot be run
    on its own."""
    counts = layer_parameters(graph)
    number = counts.index(max(counts))
    model = meta_model(config, dtype)
    _fill(model, f"{graph.layers}.{number}.", device)
    layers, experts, mixed = decoder_list(model, graph.layers), expert_configs(model), computes_bfloat16_fast(model)
    parameters = [model.get_parameter(name) for name in trained if name.startswith(f"{graph.layers}.{number}.")]
    vocabulary = model.get_input_embeddings().weight.shape[0]

    def prepared(tokens: int) -> Callable[[bool], None]:
        """A run over so many tokens, with a backward pass or without."""
        length_of = min(length, tokens)
        ids = torch.randint(min(vocabulary, 1000), (max(tokens // length_of, 1), length_of), device=device)
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
        few, all_ = prepared(_FEW), prepared(many)
        short, long = _fastest(partial(few, False)), _fastest(partial(all_, False))
        with _Living() as forward:
            all_(False)
        seconds, bytes_ = long / many, forward.most / many
        with _Living() as backward:
            all_(bool(parameters))
        twice = _fastest(partial(all_, bool(parameters)))
    slope = max(long - short, 0.5 * long) / (many - _FEW)
    rates = _rates(torch.bfloat16 if mixed else dtype, device)
    gradients = sum(parameter.nbytes for parameter in parameters)
    return LayerSample(
        counts[number], max(0.0, short - slope * _FEW), min(slope, seconds), twice / many,
        bytes_, max(bytes_, (backward.most - gradients) / many), **rates,
        whole_logits=not computes_some_logits(model),
    )  # fmt: skip


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


def _rates(head: torch.dtype, device: torch.device) -> dict[str, float]:
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


def gram_operations(width: int) -> float:
    """Operations of `add_gram` for one token: blocks on and below the diagonal, of four by four."""
    return 2 * width**2 * 10 / 16


def _fill(model: PreTrainedModel, prefix: str, device: torch.device) -> None:
    """Give the parameters below ``prefix`` random values, and all others outside the layers views of one number."""
    layers = prefix.rpartition(".")[0].rpartition(".")[0] + "."
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        inside = name.startswith(prefix)
        if not inside and name.startswith(layers):
            continue
        if inside:
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            values = values.normal_(0, 0.02) if parameter.dim() > 1 else values.fill_(1)
        else:
            one = torch.full((1,) * parameter.dim(), 0.02, dtype=parameter.dtype, device=device)
            values = one.expand(parameter.shape)
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = nn.Parameter(values, requires_grad=False)
    for name, buffer in list(model.named_buffers()):
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = buffer.to(device)


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, follows the bytes of the tensors that operators create. ``most``: of those alive at one time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = {tensor.untyped_storage()._cdata for tensor in _tensors([args, kwargs or {}])}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in taken:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}  # type: ignore[no-untyped-call]
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
