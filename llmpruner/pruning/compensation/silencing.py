"""Weights of one layer that are silenced for good, or have other values for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...structure.coupling import Role

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...structure.coupling import CouplingGraph
    from ...structure.kept import Kept


@dataclass
class _Rows:
    """Indices ``index`` of ``axis`` of a parameter. ``inside``: whether they produce units inside the layer, and not
    channels of the residual stream. ``values``: those before they were silenced."""

    parameter: torch.Tensor
    axis: int
    index: torch.Tensor
    inside: bool
    values: torch.Tensor | None = None


class ProducerRows:
    """The rows of one layer's weights that produce removed units over which a norm is computed.

    The norm depends on such units, so they must be silenced where they are produced.
    """

    def __init__(self, model: PreTrainedModel, graph: CouplingGraph, kept: Kept, number: int) -> None:
        self._rows: list[_Rows] = []
        for name, units in kept.items():
            group = graph.by_name[name]
            gone = sorted(set(range(group.units)) - set(units)) if group.is_normalized else []
            for span in group.spans_with(Role.PRODUCES):
                if gone and span.parameter.startswith(f"{graph.layers}.{number}."):
                    parameter = model.get_parameter(span.parameter)
                    index = torch.tensor(span.indices(gone), device=parameter.device)
                    self._rows.append(_Rows(parameter, span.axis, index, group.layer is not None))

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [rows.parameter for rows in self._rows]

    def zero(self) -> None:
        # All are read before any is changed: query heads are rows of their key/value heads, too.
        for rows in self._rows:
            values = rows.parameter.index_select(rows.axis, rows.index)
            if rows.inside and bool(values.any()):
                rows.values = values
        for rows in self._rows:
            rows.parameter.index_fill_(rows.axis, rows.index, 0.0)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """While active, units inside the layer are produced as if they were not removed."""
        for rows in self._rows:
            if rows.values is not None:
                rows.parameter.index_copy_(rows.axis, rows.index, rows.values)
        try:
            yield
        finally:
            self.zero()


class Originals:
    """Copies of parameters of one layer with their original values."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._pairs = [(p, p.detach().clone()) for p in {id(p): p for p in parameters}.values()]

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """While active, the parameters have their original values."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchange the values of the parameters and those that are kept here, the original ones the first time."""
        for parameter, other in self._pairs:
            parameter.data, other.data = other.data, parameter.data


def removed_channels(graph: CouplingGraph, kept: Kept) -> torch.Tensor:
    """Indices of the channels of the residual stream that are removed, int64, ascending."""
    gone: set[int] = set()
    for name, units in kept.items():
        group = graph.by_name[name]
        if group.is_normalized and group.layer is None:
            norm = next(group.spans_with(Role.NORM, Role.LAYER_NORM))
            gone.update(norm.indices(set(range(group.units)) - set(units)))
    return torch.tensor(sorted(gone), dtype=torch.long)
