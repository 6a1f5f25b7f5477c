"""Normalization: making scores of different groups comparable for one ranking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, get_args

from ...errors import UnknownNameError
from ...settings import Normalization
from ..budgets.costs import Cost, savings
from ..budgets.weights import parameter_cost

if TYPE_CHECKING:
    import torch

    from ...structure.coupling import CoupledGroup, CouplingGraph

NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)


def normalize(
    graph: CouplingGraph,
    groups: Mapping[str, CoupledGroup],
    scores: Mapping[str, torch.Tensor],
    how: str,
    cost: Cost | None = None,
    alike: Iterable[Sequence[str]] = (),
) -> dict[str, torch.Tensor]:
    """Normalized ``scores`` (group name → tensor of shape (units,)). ``how``, with s the scores of one group:

    - ``none``: s as it is;
    - ``mean``, ``max``, ``sum``: s divided by the mean, maximum or sum of abs(s);
    - ``zscore``: (s − mean) / standard deviation, as in FLAP (An et al., 2024);
    - ``parameters``: s divided by the number of parameters that are removed with one unit;
    - ``cost``: s divided by the amount of ``cost`` that each unit saves (default: the decoder's parameters). ``alike``:
      the names of groups that lose units together, as `Widths.alike` gives them; where they save different amounts, the
      mean of them divides the scores of all, so that the mean score of a common step is divided by what it saves.

    The order within a group does not change, except under ``cost`` for layers of different costs. Raises
    `UnknownNameError` for another name.
    """
    if how not in NORMALIZATIONS:
        raise UnknownNameError("normalization", how, NORMALIZATIONS)
    if how == "cost":
        cost = cost or parameter_cost(graph, [groups[name] for name in scores], decoder=True)
        saved = _shared({name: savings(cost, groups[name]) for name in scores}, alike)
        return {name: _per_saving(values, saved[name]) for name, values in scores.items()}
    return {name: _normalized(graph, groups[name], values, how) for name, values in scores.items()}


def _shared(saved: dict[str, list[float]], alike: Iterable[Sequence[str]]) -> dict[str, list[float]]:
    """``saved`` (group name → the saving of each unit) with the mean where groups that lose units together differ."""
    for names in alike:
        present = [name for name in names if name in saved]
        if any(saved[name] != saved[present[0]] for name in present):
            mean = [sum(each) / len(present) for each in zip(*(saved[name] for name in present), strict=True)]
            saved |= dict.fromkeys(present, mean)
    return saved


def _per_saving(values: torch.Tensor, saved: Sequence[float]) -> torch.Tensor:
    # Units that save nothing are not removed; any finite score will do.
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
