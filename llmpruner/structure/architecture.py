"""Protocols for the parts of `llmpruner.ModelFamily` that lower packages use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .coupling import CoupledGroup, CouplingGraph
    from .kept import Kept


class Follows(Protocol):
    """Updates module attributes after a cut, such as the number of heads that an attention module stores."""

    def follow(self, model: PreTrainedModel, graph: CouplingGraph, kept: Kept) -> None:
        """``model``: after the cut; changed in place. ``graph``: before the cut. ``kept``: group name → units kept."""


class StatesConfigs(Protocol):
    """Proposes configurations of other stock classes for a uniformly cut model that its own class cannot represent."""

    def stock_configs(self, config: PreTrainedConfig) -> Sequence[PreTrainedConfig]:
        """Candidates for ``config``; the caller verifies them against the real shapes."""


class Architecture(Follows, Protocol):
    """The coupled groups of an architecture, and the update of module attributes after a cut."""

    @property
    def is_discovered(self) -> bool:
        """Whether the attributes to update after a cut are found by trials on a small model, not set by the family."""

    def coupled_groups(self, config: PreTrainedConfig) -> Sequence[CoupledGroup]:
        """The coupled groups of a model of this configuration."""
