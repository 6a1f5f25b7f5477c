"""The cut of a plan, in memory or of weights that are read layer by layer, with what it won."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..discovery.graph import build_graph
from ..models.meta import meta_model
from ..models.surgery import cut
from ..models.weights import CutWeights
from ..pruning.budgets.base import BudgetSubject
from .outcome import outcome_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..models.model import Model, Structure
    from ..models.weights import StreamedWeights
    from ..plugins.catalog import Catalog
    from ..progress import Progress
    from ..pruning.budgets.costs import Cost
    from ..structure.outcome import Outcome
    from ..structure.plan import PruningPlan


def cut_by(model: Model, plan: PruningPlan, cost: Cost, work: Mapping[str, Any]) -> Model:
    """The model without the units that ``plan`` removes, in place where it is in memory. ``cost``: of the budget;
    ``work``: see `Model`."""
    outcome = outcome_of(model, plan, cost)
    if model.streamed is not None:
        return _cut_streamed(replace(model, work=(*model.work, work)), model.streamed, plan, outcome)
    graph = cut(model.model, model.graph, plan.kept, model.family)
    return replace(model, graph=graph, plans=(*model.plans, plan), outcome=outcome, work=(*model.work, work))


def _cut_streamed(model: Model, dense: StreamedWeights, plan: PruningPlan, outcome: Outcome) -> Model:
    """A model without weights, cut, whose weights are cut when they are read."""
    network = without_weights(model, model.model.dtype)
    network.generation_config = model.model.generation_config
    network.config.name_or_path = model.model.config.name_or_path
    graph = cut(network, model.graph, plan.kept, model.family)
    weights = CutWeights(network, dense, model.graph, plan.kept)
    return replace(
        model, model=network, graph=graph, plans=(*model.plans, plan), outcome=outcome, streamed=weights
    )  # fmt: skip


def without_weights(structure: Structure, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of ``structure`` after its cuts, with parameters on the meta device."""
    network = meta_model(structure.config, dtype)
    if structure.plans:
        graph = build_graph(structure.family, structure.config)
        for plan in structure.plans:
            graph = cut(network, graph, plan.kept, structure.family)
    return network


def recorded_cost(model: Model, plan: PruningPlan, catalog: Catalog, progress: Progress) -> Cost:
    """The cost of a plan's budget, with the measurement in the plan."""
    target, groups = plan.target, [model.graph.by_name[name] for name in plan.cuts]
    budget = catalog.create(catalog.budgets, target.counted_in, target.settings)
    return budget.cost(BudgetSubject(model.model, model.graph, groups, model.family, progress), target.measured)
