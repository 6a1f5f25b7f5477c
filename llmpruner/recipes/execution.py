"""How the stages of a prune run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..engine.boundaries import DEFAULT_LIMIT
from ..engine.executor import Executor
from ..engine.journal import Journal
from ..engine.ranks import SINGLE, Ranks
from ..engine.stages import Stages

if TYPE_CHECKING:
    from ..models.model import Model


@dataclass(frozen=True)
class Run:
    """How stages run. ``boundary_memory``: bytes of hidden states in memory. ``journal``: keeps results for a run that
    is interrupted. ``divided``: see `Executor`. ``ranks``: the processes that share the work; the first one reads or
    writes text, measures a budget and selects, and all go on with its results. ``stages``: times them."""

    boundary_memory: int = DEFAULT_LIMIT
    journal: Journal | None = None
    divided: int = 1
    ranks: Ranks = SINGLE
    stages: Stages = field(default_factory=Stages)

    def executor(self, model: Model) -> Executor:
        """For a stage that runs ``model``."""
        folder = None if self.journal is None else self.journal.folder
        return Executor(model.weights, self.boundary_memory, folder, self.divided, self.ranks)
