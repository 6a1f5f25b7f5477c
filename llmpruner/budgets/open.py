"""Budgets by name: what a target is a share of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..models.arithmetic import multiplied
from ..progress import Progress
from ..structure.coupling import CoupledGroup, CouplingGraph
from ..structure.plan import LatencyTable, Target
from ..structure.scope import Scope
from .costs import Cost, LatencyCost, MacsCost, WeightCost, parameter_cost, saving_units
from .kv_cache import measure_cache
from .latency import measure_latency
from .sizes import SizeModel

DEFAULT_CONTEXT = 512
"""Tokens in the cache where a target does not say how many."""

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.architecture import Follows


def open_budget(
    target: Target,
    model: PreTrainedModel,
    graph: CouplingGraph,
    scope: Scope,
    family: Follows,
    progress: Progress | None = None,
) -> tuple[Target, Cost]:
    """``target`` with the measurement that its budget needs, and what it counts.

    Raises `SelectionError` when nothing in ``scope`` saves any of it, and what `cost_of` raises.
    """
    groups = scope.groups(graph)
    target = with_latency(target, model, graph, groups, family, progress)
    cost = cost_of(target, model, graph, groups, family, progress)
    if target.by != "units":
        saving_units(cost, groups, {group.name: scope.allowed_units(group) for group in groups})
    return target, cost


def with_latency(
    target: Target,
    model: PreTrainedModel,
    graph: CouplingGraph,
    groups: Sequence[CoupledGroup],
    family: Follows,
    progress: Progress | None = None,
) -> Target:
    """``target`` with the measurement that its budget needs, where it does not bring one already."""
    if target.by != "ratio" or target.budget != "latency" or target.latency is not None:
        return target
    table = _measure(target, model, graph, groups, family, progress)
    return target.model_copy(update={"latency": table})


def _measure(
    target: Target,
    model: PreTrainedModel,
    graph: CouplingGraph,
    groups: Sequence[CoupledGroup],
    family: Follows,
    progress: Progress | None,
) -> LatencyTable:
    return measure_latency(model, graph, groups, family, _context(target), progress)


def _context(target: Target) -> int:
    return DEFAULT_CONTEXT if target.context is None else target.context


def cost_of(
    target: Target,
    model: PreTrainedModel,
    graph: CouplingGraph,
    groups: Sequence[CoupledGroup],
    family: Follows,
    progress: Progress | None = None,
) -> Cost:
    """What ``target`` counts, for ``model`` as it is and any cut of ``groups``. A target by total parameters counts
    these; one by units is met without a cost, and counts the decoder's parameters for what compares scores.

    Raises `UnsupportedModelError` where the budget cannot be known for this model.
    """
    budget = {"ratio": target.budget, "parameters": "parameters", "units": "decoder"}[target.by]
    if budget == "bytes":
        return byte_cost(model, graph, groups)
    if budget == "macs":
        visited = {name: experts for name, _, experts in multiplied(model)}
        return MacsCost(graph, groups, visited, _context(target))
    if budget == "kv-cache":
        return measure_cache(model, graph, groups, family, progress)
    if budget == "latency":
        return LatencyCost(graph, groups, target.latency or _measure(target, model, graph, groups, family, progress))
    return parameter_cost(graph, groups, decoder=budget == "decoder")


def byte_cost(model: PreTrainedModel, graph: CouplingGraph, groups: Sequence[CoupledGroup]) -> WeightCost:
    """Bytes of the weights in the types that they have in memory; tied ones count once."""
    weights = {name: parameter.element_size() for name, parameter in model.named_parameters()}
    return WeightCost(SizeModel(graph, groups), weights, "weights", "bytes")
