"""What one layer of a model takes on this machine: seconds and memory, from short runs with random weights.

The layer with the most parameters runs in the dtype, on the device and with the threads of the work to come, for a few
tokens; nothing is read from the checkpoint. All other parameters are views of one number, which take no memory.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import inf, prod
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..engine.statistics import add_gram
from ..engine.walk import call_layer, eager_experts, expert_configs, first_output, record
from ..models.messages import quiet_transformers
from ..models.meta import decoder_list, meta_model
from ..models.numbers import computes_bfloat16_fast
from ..models.positions import computes_some_logits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..engine.walk import Batch
    from ..structure.coupling import CouplingGraph

_FLOPS = 2e10
"""Operations of one sampled forward run: a second of a slow core, and still long products."""
_TOKENS = 64, 2048
"""At least and at most this many tokens in the longer of two runs."""
_WIDTH, _ROWS = 768, 1024
"""Of the matrices whose sums and factors are timed."""


@dataclass(frozen=True)
class Line:
    """``fixed`` for each run, and ``token`` for each token of it; of seconds or bytes."""

    fixed: float
    token: float

    def of(self, tokens: float) -> float:
        return self.fixed + self.token * tokens


@dataclass(frozen=True)
class LayerSample:
    """Measurements of one layer with ``parameters`` parameters.

    ``forward``: as a walk forwards runs it, in the dtype of its products; ``plain``: as a walk for gradients runs it,
    in the dtype of the weights if they get gradients; ``backward``: that, with the backward pass. ``*_bytes``: the
    largest sum of tensors that are alive in a run, without the weights. Rates: operations (multiply and add: two) per
    second of ``gram`` and ``product32`` in float32, ``product64``, ``factor`` (Cholesky, n³ / 3) in float64, and of the
    ``head``; ``copy``: bytes per second. ``whole_logits``: whether the model computes the logits of all positions even
    if it is asked for some.
    """

    parameters: int
    forward: Line
    plain: Line
    backward: Line
    forward_bytes: Line
    plain_bytes: Line
    backward_bytes: Line
    gram: float
    product32: float
    product64: float
    factor: float
    head: float
    copy: float
    whole_logits: bool = False


def sample_layer(
    config: PreTrainedConfig,
    graph: CouplingGraph,
    dtype: torch.dtype,
    device: torch.device,
    length: int,
    wanted: Sequence[str],
    *,
    exact: bool = True,
) -> LayerSample:
    """Run the largest layer, of those with ``wanted`` parameters if there are any. ``length``: tokens per sample at
    most; ``wanted``: the parameters that get gradients, those of other layers are left out; none: no backward pass.
    ``exact``: as for `GradientWalk`; without it, products with these parameters get gradients in their
    place. Raises whatever a layer raises that cannot be run alone."""
    number = largest_layer(graph, {graph.layer_of(name) for name in wanted})
    prefix = f"{graph.layers}.{number}."
    model = meta_model(config, dtype)
    count = _fill(model, prefix, device)
    layers = decoder_list(model, graph.layers)
    runs = _Runs(model, layers, number, length, count)
    inside = [model.get_parameter(name) for name in wanted if name.startswith(prefix)]
    mixed = computes_bfloat16_fast(model)
    forward, forward_bytes = runs.measure(lambda batch, hidden: runs.forward(batch, hidden, mixed=mixed))
    plain, plain_bytes = forward, forward_bytes
    backward, backward_bytes = plain, plain_bytes
    if inside:
        if mixed and exact:
            plain, plain_bytes = runs.measure(lambda batch, hidden: runs.forward(batch, hidden, mixed=False))
        of_weights = inside if exact else []
        backward, backward_bytes = runs.measure(
            lambda batch, hidden: runs.backward(batch, hidden, of_weights, mixed=mixed and not exact)
        )
    return LayerSample(
        count,
        forward,
        plain,
        backward,
        forward_bytes,
        plain_bytes,
        backward_bytes,
        **_rates(torch.bfloat16 if mixed else dtype, device, torch.get_num_threads()),
        whole_logits=not computes_some_logits(model),
    )


def memory_before(loaded: PreTrainedModel | None) -> int:
    """Bytes that this process holds now, without the weights of a model that is ``loaded``: they are counted with the
    stages that use it."""
    gc.collect()
    held: int = psutil.Process().memory_info().rss
    return held if loaded is None else max(0, held - sum(p.nbytes for p in loaded.parameters()))


def largest_layer(graph: CouplingGraph, among: Collection[int | None] = ()) -> int:
    """The number of the layer with the most parameters; of those in ``among`` if it names any."""
    counts = layer_parameters(graph)
    return max(range(len(counts)), key=lambda number: (number in among, counts[number]))


def layer_parameters(graph: CouplingGraph) -> list[int]:
    """Number of parameters of each layer."""
    counts = [0] * graph.num_layers
    for name, shape in graph.shapes.items():
        number = graph.layer_of(name)
        if number is not None and name not in graph.ties:
            counts[number] += prod(shape)
    return counts


class _Runs:
    """Runs of layer ``number`` over two numbers of tokens, the second twice the first."""

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, number: int, length: int, count: int) -> None:
        self.layer, self.number = layers[number], number
        self.experts = expert_configs(model)
        low, high = _TOKENS
        tokens = max(low, min(high, int(_FLOPS / (2 * count))))
        rows, length = (max(tokens // length // 2, 1), min(length, tokens // 2))
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.cases: list[tuple[Batch, torch.Tensor]] = []
        for times in (1, 2):
            ids = torch.randint(min(vocabulary, 1000), (rows * times, length), device=model.device)
            with torch.no_grad(), quiet_transformers(), eager_experts(self.experts):
                batch, hidden = record(model, layers, ids, [None] * len(layers))
            self.cases.append((batch, torch.randn_like(hidden)))

    def forward(self, batch: Batch, hidden: torch.Tensor, *, mixed: bool) -> None:
        hidden = hidden.float() if mixed else hidden
        with torch.no_grad(), torch.autocast(hidden.device.type, torch.bfloat16, enabled=mixed):
            first_output(call_layer(self.layer, hidden, batch.calls[self.number])).float()

    def backward(self, batch: Batch, hidden: torch.Tensor, parameters: Sequence[nn.Parameter], *, mixed: bool) -> None:
        for parameter in parameters:
            parameter.requires_grad_(True)
        hidden = hidden.detach().clone().requires_grad_()
        with torch.enable_grad(), torch.autocast(hidden.device.type, torch.bfloat16, enabled=mixed):
            out = first_output(call_layer(self.layer, hidden, batch.calls[self.number]))
        torch.autograd.backward(out, torch.ones_like(out))
        for parameter in parameters:
            parameter.requires_grad_(False).grad = None

    def measure(self, run: Callable[[Batch, torch.Tensor], None]) -> tuple[Line, Line]:
        """Seconds and bytes."""
        seconds, sizes, tokens = [], [], []
        with eager_experts(self.experts):
            for batch, hidden in self.cases:
                with _Living() as living:
                    run(batch, hidden)
                sizes.append(float(living.most + hidden.nbytes))
                seconds.append(_fastest(partial(run, batch, hidden)))
                tokens.append(batch.input_ids.numel())
        return _line(tokens, seconds), _line(tokens, sizes)


def _line(tokens: Sequence[int], values: Sequence[float]) -> Line:
    """Through two points; through the origin and the second where the times of short runs make it fall."""
    (a, b), (low, high) = tokens, values
    slope = (high - low) / (b - a)
    if slope <= 0 or low < slope * a:
        return Line(0.0, high / b)
    return Line(low - slope * a, slope)


def _fastest(run: Callable[[], object], least: float = 0.02) -> float:
    """Seconds of the fastest of some runs after a first one, which take ``least`` seconds together."""
    best, total = inf, 0.0
    while total < least:
        started = time.perf_counter()
        run()
        took = time.perf_counter() - started
        best, total = min(best, took), total + took
    return best


@lru_cache
def _rates(head: torch.dtype, device: torch.device, threads: int) -> Mapping[str, float]:
    """The rates of a `LayerSample`, which are those of the machine, whatever the model: measured once in a process.
    ``head``: dtype of the products of the head."""
    rows, square = torch.randn(_ROWS, _WIDTH, device=device), torch.zeros(_WIDTH, _WIDTH, device=device)
    add_gram(square, rows)
    # No float64 on Apple's GPUs.
    wide = square.double() if device.type != "mps" else square
    spd = wide.tril() + wide.tril(-1).mT
    spd.diagonal().add_(_ROWS)
    weight, few = rows.repeat(4, 1).to(head), rows[:128].to(head)
    big = torch.empty(1 << 22)
    times: dict[str, tuple[float, Callable[[], object]]] = {
        "gram": (gram_operations(_WIDTH) * _ROWS, lambda: add_gram(square, rows)),
        "product32": (2 * _ROWS * _WIDTH**2, lambda: rows @ square),
        "product64": (2 * _WIDTH**3, lambda: wide @ spd),
        "factor": (_WIDTH**3 / 3, lambda: torch.linalg.cholesky(spd)),
        "head": (2 * 128 * 4096 * _WIDTH, lambda: few @ weight.T),
        "copy": (big.nbytes, big.clone),
    }
    found = {}
    for name, (amount, run) in times.items():
        run()
        found[name] = amount / _fastest(run)
    return found


def gram_operations(width: int) -> float:
    """Operations of `add_gram` for one token: blocks on and below the diagonal, of four by four."""
    return 2 * width**2 * 10 / 16


def _fill(model: PreTrainedModel, prefix: str, device: torch.device) -> int:
    """Give the parameters below ``prefix`` random values, and all others outside the layers views of one number.
    Returns the number of the former."""
    block = torch.empty(1 << 16).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    layers = prefix.rpartition(".")[0].rpartition(".")[0] + "."
    count = 0
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        inside = name.startswith(prefix)
        if not inside and name.startswith(layers):
            continue
        if inside:
            count += parameter.numel()
            values = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
            if parameter.dim() > 1:
                _tile(values.view(-1), block.to(device, parameter.dtype))
        else:
            values = torch.full((1,) * parameter.dim(), 0.02, dtype=parameter.dtype, device=device)
            values = values.expand(parameter.shape)
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = nn.Parameter(values, requires_grad=False)
    for name, buffer in list(model.named_buffers()):
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = buffer.to(device)
    return count


def _tile(flat: torch.Tensor, block: torch.Tensor) -> None:
    whole = len(flat) // len(block) * len(block)
    flat[:whole].view(-1, len(block)).copy_(block)
    flat[whole:].copy_(block[: len(flat) - whole])


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, follows the bytes of the tensors that operators create. ``most``: of those alive at one time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(t) for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            key = _key(tensor)
            if key not in given:
                storage = tensor.untyped_storage()
                self._alive[key] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        self._alive = {k: found for k, found in self._alive.items() if not found[0].expired()}  # type: ignore[no-untyped-call]
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return result


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
