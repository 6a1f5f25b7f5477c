"""The padded form of a pruned model: all layers as wide as the widest, with zeros."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..discovery.graph import build_graph
from ..models.meta import meta_model
from ..models.surgery import cut, pad
from ..structure.coupling import LAYER, CouplingGraph
from ..structure.kept import Kept, compose_all, renamed
from ..structure.wider import dense, widest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .base import ExportSource


@dataclass(frozen=True)
class Padded:
    """``before``, ``after``: parameters, tied ones once."""

    model: PreTrainedModel
    before: int
    after: int

    @property
    def cost(self) -> str:
        """One clause on what the zeros take."""
        more = self.after / self.before - 1
        return f"padded with zeros from {self.before:,} to {self.after:,} parameters ({more:+.1%})"


def padded_forms(source: ExportSource) -> Iterator[Padded]:
    """``source`` with all layers as wide as the widest, then with all layers as wide as in the dense model (for classes
    that derive the size of a head from their number). The same model, with zeros. Raises `UnsupportedModelError`."""
    for fill in (widest, dense):
        wide, graph = whole(source, source.config)
        now = _now(source, graph)
        pad(source.model, wide, graph, now, fill(graph, now), source.family)
        yield Padded(wide.eval(), parameters(source.model), parameters(wide))


def whole(source: ExportSource, config: PreTrainedConfig) -> tuple[PreTrainedModel, CouplingGraph]:
    """A model of ``config`` without weights, with the layers that ``source`` still has, and its graph. ``config``: as
    that of the dense model, but for widths."""
    wide, graph = meta_model(config), build_graph(source.family, config)
    for plan in source.plans:
        removable = {group.name for group in graph.of_kinds([LAYER])}
        layers = {name: units for name, units in plan.kept.items() if name in removable}
        if layers:
            graph = cut(wide, graph, layers, source.family)
    return wide, graph


def _now(source: ExportSource, graph: CouplingGraph) -> Kept:
    """The units of ``graph``, the dense model's with the remaining layers, that ``source`` still has."""
    dense_graph = build_graph(source.family, source.config)
    kept = compose_all(dense_graph, [plan.kept for plan in source.plans])
    names = renamed(dense_graph, kept)
    return {
        names[name]: units for name, units in kept.items() if name in names and dense_graph.by_name[name].kind != LAYER
    }


def parameters(model: PreTrainedModel) -> int:
    """The number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
