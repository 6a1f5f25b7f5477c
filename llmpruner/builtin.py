"""The built-in criteria and strategies: an ordinary plugin that is always there."""

from __future__ import annotations

from .hookspecs import hookimpl
from .importance.base import ImportanceCriterion
from .recovery.base import RecoveryStrategy


@hookimpl
def llmpruner_importance_criteria() -> list[type[ImportanceCriterion]]:
    return []


@hookimpl
def llmpruner_recovery_strategies() -> list[type[RecoveryStrategy]]:
    return []
