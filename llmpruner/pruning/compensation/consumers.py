"""The weights of a layer that read removed units, found by the roles of spans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...structure.coupling import CouplingGraph, Role
from ...structure.kept import kept_indices

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import nn

    from ...structure.kept import Kept


@dataclass(frozen=True)
class Consumer:
    """A weight of one layer that loses inputs. ``axis``: the input axis of the parameter; ``kept``: its kept indices,
    int64, ascending. ``from_stream``: whether the inputs are normed channels of the residual stream instead of units
    inside the layer. ``shape``: of the parameter. ``normed``: whether a norm inside the layer is computed over its
    units (query and key norms over all heads), so that they are silenced where they are produced."""

    parameter: str
    axis: int
    kept: torch.Tensor
    from_stream: bool
    shape: tuple[int, ...]
    normed: bool = False

    @property
    def intact(self) -> bool:
        """Whether all inputs are kept, see `intact_readers`."""
        return len(self.kept) == self.shape[self.axis]


def consumers_of(graph: CouplingGraph, kept: Kept, layer: int) -> dict[str, Consumer]:
    """Parameter → consumer, for every weight matrix of ``layer`` that loses inputs."""
    prefix = f"{graph.layers}.{layer}."
    stays = kept_indices(graph, kept, prefix)
    found: dict[str, Consumer] = {}
    for name in kept:
        group = graph.by_name[name]
        for span in group.spans_with(Role.CONSUMES):
            shape = graph.shapes[span.parameter]
            summed = span.axis >= len(shape) - 2 and len(shape) >= 2
            if span.parameter.startswith(prefix) and summed and (span.parameter, span.axis) in stays:
                index = torch.tensor(stays[span.parameter, span.axis])
                inside, before = group.layer is not None, found.get(span.parameter)
                # Query heads have a norm of their own in some models, and are units beside their key/value heads.
                normed = (inside and group.is_normalized) or (before is not None and before.normed)
                from_stream = group.is_normalized and not inside
                found[span.parameter] = Consumer(span.parameter, span.axis, index, from_stream, shape, normed)
    return found


def intact_readers(graph: CouplingGraph, kept: Kept, layer: int, groups: Collection[str]) -> dict[str, Consumer]:
    """Parameter → consumer that keeps all inputs, for every weight matrix of ``layer`` that reads units of ``groups``
    inside it and loses none. Groups of ``kept`` are left out, and experts: in the dense model, other tokens are routed
    to them."""
    cut = consumers_of(graph, kept, layer)
    found: dict[str, Consumer] = {}
    for group in graph.groups:
        wanted = group.layer == layer and group.name in groups and group.name not in kept
        for span in group.spans_with(Role.CONSUMES) if wanted else ():
            shape = graph.shapes[span.parameter]
            if span.parameter not in cut and len(shape) == 2:
                everything = torch.arange(shape[span.axis])
                found[span.parameter] = Consumer(span.parameter, span.axis, everything, False, shape)
    return found


def stream_writers(graph: CouplingGraph, layer: int) -> Sequence[str]:
    """The weights whose outputs ``layer`` adds to the residual stream: those that read units inside it (output
    projection of attention, down projection of an MLP), unless they produce other ones (the second projection of a
    latent vector)."""
    inside = [group for group in graph.groups if group.layer == layer]
    produce = {span.parameter for group in inside for span in group.spans_with(Role.PRODUCES)}
    return tuple(
        dict.fromkeys(
            span.parameter
            for group in inside
            for span in group.spans_with(Role.CONSUMES)
            if len(graph.shapes[span.parameter]) >= 2 and span.parameter not in produce
        )
    )


def matrix_of(model: nn.Module, consumer: Consumer, slot: int | None) -> torch.Tensor:
    """The matrix (out, in) of a consumer, as a view: of expert ``slot`` where the parameter stacks several."""
    parameter = model.get_parameter(consumer.parameter).data
    axis = consumer.axis
    if slot is not None:
        parameter, axis = parameter[slot], axis - 1
    return parameter if axis == 1 else parameter.T


def zero_inputs(model: nn.Module, consumer: Consumer) -> None:
    """Set the weights of a consumer for removed inputs to zero."""
    parameter = model.get_parameter(consumer.parameter).data
    gone = torch.ones(parameter.shape[consumer.axis], dtype=torch.bool)
    gone[consumer.kept] = False
    parameter.index_fill_(consumer.axis, gone.nonzero().flatten().to(parameter.device), 0.0)
