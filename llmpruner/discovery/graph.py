"""The coupling graph of a family's model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..models.meta import graph_of, meta_model
from ..structure.architecture import declared_groups
from ..structure.coupling import CouplingGraph
from .family import ModelFamily
from .groups import collect_blocked

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def build_graph(family: ModelFamily, config: PreTrainedConfig) -> CouplingGraph:
    """The coupling graph of a dense model, with the shapes of an instance on the meta device, which takes no memory.
    Raises `CouplingError` where the family's groups contradict them.

    If the family's groups are discovered, ``blocked`` lists the axes without units that no group owns.
    """
    with collect_blocked() as blocked:
        graph = graph_of(meta_model(config), lambda: declared_groups(family, config))
    owned = {(span.parameter, span.axis) for group in graph.groups for span in group.spans}
    if any(group.modules for group in graph.groups):
        owned.add((graph.layers, 0))
    return replace(graph, blocked=tuple(b for b in blocked if (b.parameter, b.axis) not in owned))
