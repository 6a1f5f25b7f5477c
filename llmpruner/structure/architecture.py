"""Protocols for the parts of `llmpruner.ModelFamily` that lower packages use."""

from __future__ import annotations

from collections.abc import Sequence
from reprlib import repr as short_repr
from typing import TYPE_CHECKING, Protocol

from ..errors import LlmprunerError, PluginError, first_line
from .coupling import CoupledGroup

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .coupling import CouplingGraph
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


def declared_groups(architecture: Architecture, config: PreTrainedConfig) -> tuple[CoupledGroup, ...]:
    """``architecture.coupled_groups(config)``. Raises `PluginError`, which names the family and its package, where a
    plugin's method raises anything but `LlmprunerError`, or returns something else than groups."""
    cls = type(architecture)
    where = f"family '{getattr(architecture, 'name', cls.__name__)}' of package {cls.__module__.partition('.')[0]}"
    try:
        found = architecture.coupled_groups(config)
        groups = None if found is None else tuple(found)
    except LlmprunerError:
        raise
    except (Exception, SystemExit) as error:
        if getattr(cls.coupled_groups, "__module__", "").startswith("llmpruner."):
            raise  # discovery, which the family did not override
        raise PluginError(f"{where}: coupled_groups raised {type(error).__name__}: {first_line(error)}") from error
    if groups is None:
        raise PluginError(f"{where}: coupled_groups returned None; expected a list of CoupledGroup")
    for group in groups:
        if not isinstance(group, CoupledGroup):
            raise PluginError(
                f"{where}: coupled_groups returned {short_repr(group)} in its list; expected CoupledGroup"
            )
    return groups
