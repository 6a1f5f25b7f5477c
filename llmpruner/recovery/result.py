"""What a training gives, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..settings import RecoverSettings
from .base import RecoveryStrategy, Validation
from .shared_settings import shared_settings


@dataclass(frozen=True)
class RecoveryResult:
    """``model``: of the same class as before; a peft model where adapters were not merged. ``losses``: see
    `TrainingResult`. ``seconds``: of this run, without those before an interruption. ``examples``: number of rows that
    were trained on. ``fingerprint``: see `TrainingData`. ``validation``: the losses on ``validation_examples`` rows, in
    order of steps; empty where there was none. ``best_step``: the number of steps after which the weights were taken;
    None without validation."""

    model: Any
    strategy: RecoveryStrategy
    settings: RecoverSettings
    losses: tuple[float, ...]
    seconds: float
    examples: int
    source: str
    fingerprint: str
    trainable_parameters: int
    notes: tuple[str, ...]
    validation: tuple[Validation, ...] = ()
    validation_examples: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best_step(self) -> int | None:
        return min(self.validation, key=lambda one: one.loss).step if self.validation else None

    def record(self) -> dict[str, Any]:
        """The training as JSON values, for ``llmpruner.json``."""
        return {
            "strategy": self.strategy.name,
            "strategy_settings": self.strategy.record(),
            "settings": shared_settings(self.settings),
            "data": self.source,
            "fingerprint": self.fingerprint,
            "examples": self.examples,
            "trainable_parameters": self.trainable_parameters,
            "losses": list(self.losses),
            "validation_examples": self.validation_examples,
            "validation": [asdict(one) for one in self.validation],
            "best_step": self.best_step,
            **self.details,
        }
