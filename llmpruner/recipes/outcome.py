"""The size of a model before and after a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..models.numbers import stored_dtype
from ..pruning.budgets.costs import Cost
from ..pruning.budgets.sizes import counts
from ..pruning.budgets.weights import byte_cost
from ..structure.kept import parameters_after
from ..structure.outcome import BudgetOutcome, Outcome

if TYPE_CHECKING:
    from ..models.model import Model
    from ..structure.plan import PruningPlan


def outcome_of(model: Model, plan: PruningPlan, cost: Cost | None) -> Outcome:
    """The `Outcome` of a plan. ``model``: before the cut. ``cost``: of the plan's budget; None to leave it out."""
    graph = model.graph
    groups = [graph.by_name[name] for name in plan.cuts]
    total, decoder = parameters_after(graph, plan.kept)
    left = counts(graph, plan.kept)
    weights = byte_cost(model.model, graph, groups)
    budget = None
    if cost is not None and plan.target.by == "ratio" and plan.target.budget not in ("decoder", "parameters", "bytes"):
        whole, after = cost.value(cost.remaining()), cost.value(cost.remaining(*left))
        budget = BudgetOutcome(plan.target.budget, cost.label, whole, after)
    before, memory, stored = weights.remaining(), model.model.dtype, stored_dtype(model)
    # The budget of bytes, by which the plan was made, counts those in memory.
    if plan.target.budget != "bytes" and stored is not None and stored.itemsize < memory.itemsize:
        before = before * stored.itemsize // memory.itemsize
    return Outcome(
        graph.total_parameters, total, graph.decoder_parameters, decoder, before, weights.remaining(*left), budget
    )
