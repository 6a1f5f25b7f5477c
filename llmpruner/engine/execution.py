"""How a run executes: all that stages take besides their job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

from ..models.weights import Weights
from ..progress import QUIET, Progress
from .boundaries import Boundaries
from .ranks import SINGLE, Ranks
from .stages import Stages

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from .journal import Journal
    from .walk import LayerForm


TOKENS_AT_ONCE = 4096
"""Tokens of a micro-batch in a walk forwards, at least one sample."""
TOKENS_WITH_GRADIENTS = 1024
"""The same in a walk with gradients, which keeps what is computed inside a layer."""


@dataclass(frozen=True)
class Execution:
    weights: Weights
    """Of the model that runs, in memory or read layer by layer."""
    ranks: Ranks = SINGLE
    """The processes that the calibration text is spread over."""
    journal: Journal | None = None
    """Keeps the results of finished layers, for a run that goes on."""
    progress: Progress = QUIET
    stages: Stages = field(default_factory=Stages)
    forms: WeakKeyDictionary[PreTrainedModel, LayerForm] = field(default_factory=WeakKeyDictionary)
    """Of models whose layers `walk.check_layers` has compared."""
    shared: Journal | None = None
    """Keeps calibration text and scores, which runs with other ratios have in common."""

    @classmethod
    def of(cls, model: PreTrainedModel, path: str, ranks: Ranks = SINGLE) -> Execution:
        """For a model in memory. ``path``: of its module list of decoder layers."""
        return cls(Weights(model, path), ranks=ranks)

    @property
    def model(self) -> PreTrainedModel:
        return self.weights.model

    @property
    def layers(self) -> nn.ModuleList:
        return cast("nn.ModuleList", self.weights.model.get_submodule(self.weights.path))

    def boundaries(self) -> Boundaries:
        """For hidden states, with a file in the folder of the journal, or in the system's for temporary files."""
        return Boundaries(None if self.journal is None else self.journal.folder)
