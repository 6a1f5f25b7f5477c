"""The coupling graph of a family's model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..models.decoder import graph_of
from ..models.empty import meta_model
from ..structure.coupling import CouplingGraph
from .family import ModelFamily

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def build_graph(family: ModelFamily, config: PreTrainedConfig) -> CouplingGraph:
    """The coupling graph of a dense model: the family's groups, checked against the shapes of an instance that
    is built on the meta device, so that it costs no memory whatever the size."""
    return graph_of(meta_model(config), lambda: family.coupled_groups(config))
