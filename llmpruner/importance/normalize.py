"""How scores of different groups become comparable, before one ranking goes over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import UnknownNameError

if TYPE_CHECKING:
    import torch

    from ..coupling import CoupledGroup, CouplingGraph

NORMALIZATIONS = ("none", "mean", "max", "sum", "zscore", "parameters")


def normalize(
    graph: CouplingGraph, groups: Mapping[str, CoupledGroup], scores: Mapping[str, torch.Tensor], how: str
) -> dict[str, torch.Tensor]:
    """Scores by group, divided by the ``mean``, ``max`` or ``sum`` of the group's magnitudes, standardised
    (``zscore``, as FLAP does), or divided by the ``parameters`` that go with one unit. Order within a group never
    changes."""
    if how not in NORMALIZATIONS:
        raise UnknownNameError("normalization", how, NORMALIZATIONS)
    return {name: _normalized(graph, groups[name], values, how) for name, values in scores.items()}


def _normalized(graph: CouplingGraph, group: CoupledGroup, values: torch.Tensor, how: str) -> torch.Tensor:
    tiny = 1e-300
    if how == "mean":
        return values / values.abs().mean().clamp_min(tiny)
    if how == "max":
        return values / values.abs().max().clamp_min(tiny)
    if how == "sum":
        return values / values.abs().sum().clamp_min(tiny)
    if how == "zscore":
        return (values - values.mean()) / values.std(correction=0).clamp_min(tiny)
    if how == "parameters":
        return values / max(graph.parameters_per_unit(group), 1)
    return values
