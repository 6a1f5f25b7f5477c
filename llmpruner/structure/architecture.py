"""The parts of `llmpruner.ModelFamily` that packages below it use, as protocols."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .coupling import CoupledGroup, CouplingGraph
    from .kept import Kept


class Follows(Protocol):
    """Updates what is no parameter after a cut, such as the number of heads that an attention module stores."""

    def follow(self, model: PreTrainedModel, graph: CouplingGraph, kept: Kept) -> None:
        """``model``: already cut. ``graph``: before the cut. ``kept``: group name → units kept."""


class StatesConfigs(Protocol):
    """Proposes stock configurations for a uniformly cut model that its own configuration class refuses."""

    def stock_configs(self, config: PreTrainedConfig) -> Sequence[PreTrainedConfig]:
        """Candidates for ``config``; whoever asks verifies them against the real shapes."""


class Architecture(Follows, Protocol):
    """The coupled groups of an architecture and what follows a cut of them."""

    @property
    def is_discovered(self) -> bool:
        """Whether what must follow a cut is found by trying on a small model, rather than set by the family."""

    def coupled_groups(self, config: PreTrainedConfig) -> Sequence[CoupledGroup]:
        """The coupled groups of a model of this configuration."""
