"""How a layer uses its weights, found by running it on the first micro-batch: what it adds to the residual stream, and
the order of its matrix products."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch

from ...engine.products import WatchedProduct, WatchProducts
from .consumers import stream_writers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...engine.boundaries import States
    from ...engine.walk import ForwardWalk
    from ...structure.coupling import CouplingGraph

_DIRECT = 2e-2
"""Largest relative residual for a layer's output to count as its input plus a multiple of its `stream_writers`'
outputs."""


class Order(NamedTuple):
    """Names of parameters of one layer. ``stages``: matrices in the order of their use, those that read the same inputs
    in one list; ``biases``: theirs; ``last``: the last of the `stream_writers` that is used, None without any."""

    stages: list[list[str]]
    biases: list[str]
    last: str | None


def stream_factor(walk: ForwardWalk, graph: CouplingGraph, number: int, states: States) -> float | None:
    """c, where the output of layer ``number`` is its input plus c times the outputs of its `stream_writers`; None where
    it is not. ``states``: hidden states before the layer, of which the first is used.

    c is the least-squares solution, taken if its relative residual is below `_DIRECT`.
    """
    outputs: list[torch.Tensor] = []

    def seen(use: WatchedProduct) -> None:
        # The layer may add to them in place afterwards.
        outputs.append(use.outputs.to(torch.float32, copy=True))

    batch, hidden = walk.batches[0], states[0]
    with WatchProducts(walk.execution.model, stream_writers(graph, number), seen):
        change = (walk.run(number, batch, hidden, states.passed, tried=True) - hidden).flatten(0, -2)
    if not outputs or any(part.shape != change.shape for part in outputs):
        return None
    total = torch.stack(outputs).sum(0)
    factor = float((change * total).sum() / total.square().sum().clamp_min(1e-30))
    return factor if float((change - factor * total).norm()) < _DIRECT * float(change.norm()) else None


def order_of_use(walk: ForwardWalk, graph: CouplingGraph, number: int, states: States, names: Collection[str]) -> Order:
    """The order in which layer ``number`` uses the matrices ``names``. ``states``: as in `stream_factor`."""
    uses: dict[str, WatchedProduct] = {}

    # Inputs are compared by address; all are kept until the end, so that no address is used twice. Their values,
    # which may have changed by then, are not read.
    def seen(use: WatchedProduct) -> None:
        uses.setdefault(use.parameter, use)

    model, writers = walk.execution.model, stream_writers(graph, number)
    with WatchProducts(model, dict.fromkeys([*names, *writers]), seen):
        walk.run(number, walk.batches[0], states[0], states.passed, tried=True)
    last = next((name for name in reversed(uses) if name in writers), None)
    uses = {name: use for name, use in uses.items() if name in names}
    together = groupby(uses.values(), key=lambda use: use.inputs.data_ptr())
    stages = [[use.parameter for use in same] for _, same in together]
    biases = [use.bias for use in uses.values() if use.bias is not None]
    return Order(stages, names_in_layer(model, graph, number, biases), last)


def names_in_layer(
    model: PreTrainedModel, graph: CouplingGraph, number: int, tensors: Sequence[torch.Tensor]
) -> list[str]:
    """The names of the parameters of layer ``number`` that ``tensors`` are, or are views of."""
    wanted = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    prefix = f"{graph.layers}.{number}."
    layer = model.get_submodule(prefix[:-1])
    return [prefix + n for n, p in layer.named_parameters() if p.untyped_storage().data_ptr() in wanted]
