"""Opening a budget: the cost of a model, and the measurement that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...engine.ranks import SINGLE, Ranks
from ...structure.scope import Scope
from .base import Budget, BudgetSubject
from .costs import Cost, saving_units


def open_budget(
    budget: Budget, subject: BudgetSubject, scope: Scope, ranks: Ranks = SINGLE
) -> tuple[Mapping[str, Any] | None, Cost]:
    """The result of `Budget.measure` (None where it measures nothing) in the first of several processes ``ranks``, and
    the cost of ``subject``.

    Raises `SelectionError` when no unit in ``scope`` saves any of the cost, and whatever the budget raises.
    """
    measured = ranks.from_first(lambda: budget.measure(subject))
    cost = budget.cost(subject, measured)
    saving_units(cost, subject.groups, {group.name: scope.allowed_units(group) for group in subject.groups})
    return measured, cost
