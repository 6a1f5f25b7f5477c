"""How a run executes: all that stages take besides their job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.weights import Weights
from ..progress import QUIET, Progress
from .boundaries import Boundaries
from .journal import Journal
from .ranks import SINGLE, Ranks
from .stages import Stages

TOKENS_AT_ONCE = 4096
"""Tokens of a micro-batch in a walk forwards, at least one sample."""
TOKENS_WITH_GRADIENTS = 1024
"""The same in a walk with gradients, which keeps what is computed inside a layer."""


class LayerForm(NamedTuple):
    """How the layers of a model run one by one."""

    tuples: Sequence[int | None]
    """How many further values each layer returns; None for a bare tensor."""
    autocast: torch.dtype | None
    """The dtype of matrix products under autocast, with hidden states in float32; None where all is in the model's
    dtype: in float32 without fast bfloat16, and where a layer refuses."""
    passes_on: bool
    """Whether layers pass on other values than hidden states (`States.passed`), which `States.dump` does not write."""


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
    """Keeps calibration text and scores, which are shared by the runs for all ratios."""
    forecast: Mapping[str, Any] | None = None
    """What the run is expected to take, for its record."""

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
