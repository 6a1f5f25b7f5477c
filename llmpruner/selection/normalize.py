"""How scores of different groups become comparable, before one ranking goes over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..budgets.costs import Cost, parameter_cost, savings
from ..errors import UnknownNameError

if TYPE_CHECKING:
    import torch

    from ..structure.coupling import CoupledGroup, CouplingGraph

NORMALIZATIONS = ("none", "mean", "max", "sum", "zscore", "parameters", "cost")


def normalize(
    graph: CouplingGraph,
    groups: Mapping[str, CoupledGroup],
    scores: Mapping[str, torch.Tensor],
    how: str,
    cost: Cost | None = None,
) -> dict[str, torch.Tensor]:
    """Scores by group, divided by the ``mean``, ``max`` or ``sum`` of the group's magnitudes, standardised
    (``zscore``, as FLAP does), or divided by the ``parameters`` that go with one unit, or by what it saves of the
    budget (``cost``; of the decoder's parameters where there is none). Order within a group never changes, except of
    layers that save unlike amounts."""
    if how not in NORMALIZATIONS:
        raise UnknownNameError("normalization", how, NORMALIZATIONS)
    if how == "cost":
        cost = cost or parameter_cost(graph, [groups[name] for name in scores], decoder=True)
        return {name: _per_saving(values, savings(cost, groups[name])) for name, values in scores.items()}
    return {name: _normalized(graph, groups[name], values, how) for name, values in scores.items()}


def _per_saving(values: torch.Tensor, saved: Sequence[float]) -> torch.Tensor:
    # What saves nothing is never removed for it; any finite score will do.
    return values / values.new_tensor([amount if amount > 0 else 1.0 for amount in saved])


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
