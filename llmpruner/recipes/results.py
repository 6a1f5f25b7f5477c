"""What a recipe has done, and what it will do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class StepResult:
    """One finished step. ``directory``: its folder. ``skipped``: whether it was done before, with the same inputs.
    ``seconds``: that it took, without those before an interruption.

    ``result``: JSON values: sizes of a prune, facts of a training, what ``evaluate --json`` and ``bench --json`` write,
    generated texts, how to load an export. ``value``: what the function of the command gives, without models: for
    prune (`PruningPlan`, `Outcome`), for evaluate `Evaluations`, for bench `BenchResult`; None for other commands and
    where the step was skipped.
    """

    name: str
    command: str
    directory: Path
    skipped: bool
    seconds: float
    result: Any
    value: Any = field(default=None, repr=False)

    def as_json(self) -> dict[str, Any]:
        """JSON values of all fields but ``value``."""
        return {
            "name": self.name,
            "command": self.command,
            "directory": str(self.directory),
            "skipped": self.skipped,
            "seconds": round(self.seconds, 1),
            "result": self.result,
        }


@dataclass(frozen=True)
class RecipeResult:
    """All steps of a recipe, in their order. ``model``: the dense model; ``output``: the folder."""

    model: str
    output: Path
    steps: tuple[StepResult, ...]

    def __getitem__(self, name: str) -> StepResult:
        """The step of that name. Raises `KeyError`."""
        return {step.name: step for step in self.steps}[name]

    def as_json(self) -> dict[str, Any]:
        """JSON values, as ``llmpruner run --json`` prints them."""
        return {"model": self.model, "output": str(self.output), "steps": [step.as_json() for step in self.steps]}


@dataclass(frozen=True)
class PlannedStep:
    """What a run would do with a step. ``status``: done (it would be skipped), interrupted (it would go on), or to do.
    ``reason``: why it is to be done again; empty otherwise. ``reads``: names of models. ``forecast``: what it will
    take, in words; empty where that is not known before. ``facts``: the same as JSON values."""

    name: str
    command: str
    status: Literal["done", "interrupted", "to do"]
    reason: str
    reads: tuple[str, ...]
    forecast: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """JSON values, with ``facts`` under ``forecast``."""
        return {
            "name": self.name,
            "command": self.command,
            "status": self.status,
            "reason": self.reason,
            "reads": list(self.reads),
            "forecast": dict(self.facts),
        }
