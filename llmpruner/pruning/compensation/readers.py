"""The weights of a layer that read removed units (spans with the role ``CONSUMES``), and those that produce them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...structure.coupling import CouplingGraph, Role
from ...structure.kept import Kept, kept_indices


@dataclass(frozen=True)
class Reader:
    """A weight of one layer that loses inputs. ``axis``: the input axis; ``kept``: its kept indices, int64, ascending.
    ``from_stream``: the inputs are normed channels of the residual stream. ``normed``: a norm in the layer is computed
    over the units (query and key norms over all heads), so that they are silenced where they are produced."""

    parameter: str
    axis: int
    kept: torch.Tensor
    from_stream: bool
    shape: tuple[int, ...]
    normed: bool = False


def readers_of(graph: CouplingGraph, kept: Kept, layer: int) -> dict[str, Reader]:
    """Parameter → reader, for every weight matrix of ``layer`` that loses inputs."""
    prefix = f"{graph.layers}.{layer}."
    stays = kept_indices(graph, kept, prefix)
    readers: dict[str, Reader] = {}
    for name in kept:
        group = graph.by_name[name]
        for span in group.spans_with(Role.CONSUMES):
            shape = graph.shapes[span.parameter]
            summed = span.axis >= len(shape) - 2 and len(shape) >= 2
            if span.parameter.startswith(prefix) and summed and (span.parameter, span.axis) in stays:
                index = torch.tensor(stays[span.parameter, span.axis])
                inside, before = group.layer is not None, readers.get(span.parameter)
                # Query heads have a norm of their own in some models, and are units beside their key/value heads.
                normed = (inside and group.is_normalized) or (before is not None and before.normed)
                from_stream = group.is_normalized and not inside
                readers[span.parameter] = Reader(span.parameter, span.axis, index, from_stream, shape, normed)
    return readers


def stream_writers(graph: CouplingGraph, layer: int) -> list[str]:
    """The weights whose outputs ``layer`` adds to the residual stream: output and down projections."""
    inside = [group for group in graph.groups if group.layer == layer]
    produce = {span.parameter for group in inside for span in group.spans_with(Role.PRODUCES)}
    return [
        span.parameter
        for group in inside
        for span in group.spans_with(Role.CONSUMES)
        if len(graph.shapes[span.parameter]) >= 2 and span.parameter not in produce
    ]


def removed_channels(graph: CouplingGraph, kept: Kept) -> torch.Tensor:
    """Indices of the channels of the residual stream that are removed, int64, ascending."""
    gone: set[int] = set()
    for name, units in kept.items():
        group = graph.by_name[name]
        if group.is_normalized and group.layer is None:
            norm = next(group.spans_with(Role.NORM))
            gone.update(norm.indices(set(range(group.units)) - set(units)))
    return torch.tensor(sorted(gone), dtype=torch.long)


def bias_name(model: PreTrainedModel, graph: CouplingGraph, layer: int, bias: torch.Tensor) -> str | None:
    """The name of the parameter of a layer that ``bias`` is, or is a view of."""
    path = f"{graph.layers}.{layer}"
    for name, parameter in model.get_submodule(path).named_parameters():
        if 0 <= bias.data_ptr() - parameter.data_ptr() < parameter.nbytes:
            return f"{path}.{name}"
    return None


class ProducerRows:
    """The rows of one layer's weights that produce removed units, where a norm is computed over these."""

    def __init__(self, model: PreTrainedModel, graph: CouplingGraph, kept: Kept, number: int) -> None:
        self.names: list[str] = []  # of the weights
        self._rows: list[tuple[torch.Tensor, int, torch.Tensor]] = []  # parameter, axis, indices
        self._values: list[torch.Tensor | None] = []  # once silenced; None for residual channels, which stay silent
        for name, units in kept.items():
            group = graph.by_name[name]
            gone = sorted(set(range(group.units)) - set(units)) if group.is_normalized else []
            for span in group.spans_with(Role.PRODUCES):
                if gone and span.parameter.startswith(f"{graph.layers}.{number}."):
                    parameter = model.get_parameter(span.parameter)
                    index = torch.tensor(span.indices(gone), device=parameter.device)
                    self.names.append(span.parameter)
                    self._rows.append((parameter, span.axis, index))
                    self._values.append(None if group.layer is None else parameter.index_select(span.axis, index))

    def zero(self) -> None:
        # All are read before any is changed: query heads are rows of their key/value heads, too.
        for number, (parameter, axis, index) in enumerate(self._rows):
            values = parameter.index_select(axis, index)
            if self._values[number] is not None and bool(values.any()):
                self._values[number] = values
        for parameter, axis, index in self._rows:
            parameter.index_fill_(axis, index, 0.0)

    def restore(self) -> None:
        """Until `zero` is called, units inside the layer are produced as if they were not removed."""
        for (parameter, axis, index), values in zip(self._rows, self._values, strict=True):
            if values is not None:
                parameter.index_copy_(axis, index, values)
