"""RecoveryStrategy: how quality is given back to a pruned model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.coupling import CouplingGraph


@dataclass(frozen=True, slots=True)
class RecoverySettings:
    """The settings of one recovery run; the defaults are the paper's (LLM-Pruner, section 4.1)."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    learning_rate: float = 1e-4
    epochs: float = 2.0
    max_steps: int | None = None
    batch_size: int = 64
    micro_batch_size: int = 4
    cutoff: int = 256
    warmup_steps: int = 100
    """At most; runs shorter than a thousand steps warm up over a tenth of their steps."""
    loss_on: Literal["all", "answers"] = "all"
    seed: int = 0
    autocast: bool = False
    """Compute in bfloat16 under autocast while weights stay in their dtype."""


@dataclass(frozen=True)
class RecoveryJob:
    """What a strategy works on. ``examples``: rows of ``input_ids`` and ``labels`` (int lists of one length,
    −100 is not trained on), already truncated. ``graph``: the coupled groups of the pruned model, to choose
    parameters by role instead of by name. ``work_dir``: kept between runs of the same job; put trainer
    checkpoints there and resume from them. ``on_step``: called after each optimizer step with its number from
    1, the number of steps, and its loss."""

    model: PreTrainedModel
    tokenizer: Any
    examples: Sequence[Mapping[str, list[int]]]
    graph: CouplingGraph
    settings: RecoverySettings
    work_dir: Path
    on_step: Callable[[int, int, float], None] | None = None


@dataclass(frozen=True)
class TrainingResult:
    """What a strategy gives back. ``losses``: mean loss per token of every optimizer step, those before an
    interruption included. ``notes``: what the user should know, one line each."""

    model: Any
    losses: tuple[float, ...]
    trainable_parameters: int
    notes: tuple[str, ...] = ()


class RecoveryStrategy:
    """Trains a pruned model. Created without arguments, stateless.

    `train` returns the model to be saved with its loss curve: a plain transformers model, or a peft model
    whose adapters the core merges (or saves alone, with ``--no-merge``).
    """

    name: ClassVar[str] = ""
    """What ``recover --strategy`` takes; unique over all plugins."""
    summary: ClassVar[str] = ""
    """One line for ``--help`` and ``llmpruner plugins``."""

    def train(self, job: RecoveryJob) -> TrainingResult:
        """Train ``job.model``, in place or wrapped. Same job, same result: take every random number from
        ``job.settings.seed``."""
        raise NotImplementedError
