"""The built-in criteria and strategies: an ordinary plugin that is always there."""

from __future__ import annotations

from .hookspecs import hookimpl
from .importance.base import ImportanceCriterion
from .importance.magnitude import L1, L2, Random
from .importance.taylor import Taylor
from .recovery.base import RecoveryStrategy
from .recovery.full import FullStrategy
from .recovery.lora import LoraStrategy


@hookimpl
def llmpruner_importance_criteria() -> list[type[ImportanceCriterion]]:
    return [Random, L1, L2, Taylor]


@hookimpl
def llmpruner_recovery_strategies() -> list[type[RecoveryStrategy]]:
    return [LoraStrategy, FullStrategy]
