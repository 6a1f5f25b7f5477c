"""What a recovery strategy is, what it is called with, and what it returns. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component
from ..settings import RecoverSettings
from ..structure.coupling import CouplingGraph

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .predictions import Predictions

Row = Mapping[str, list[int]]
"""``input_ids`` and ``labels`` of one example, of equal length, not padded. A label is the token at the same position,
or −100 for tokens that are not trained on."""


class RecoveryStrategy(Component):
    """Trains a pruned model.

    A strategy with its own loss can pass it to the training loop of the built-in ones::

        class Imitation(RecoveryStrategy):
            name = "imitation"
            summary = "trains every parameter on the squared difference of the logits from the dense model's"
            needs_dense = True

            def train(self, job):
                teacher = job.teacher()

                def loss(model, batch):
                    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
                    difference = model(**inputs).logits - teacher(**inputs).logits
                    return difference[:, :-1][batch["labels"][:, 1:] != -100].square().mean()

                job.model.requires_grad_(True)
                return fit(job.model, job, loss)
    """

    kind: ClassVar[str] = "recovery strategy"
    hook: ClassVar[str] = "llmpruner_recovery_strategies"
    needs_dense: ClassVar[bool] = False
    """Whether `train` uses the dense model, which is looked for before anything is loaded."""
    takes_predictions: ClassVar[bool] = False
    """Whether `train` reads ``job.predictions``, where they are there, in place of ``job.teacher``."""

    @property
    def needs_peft(self) -> bool:
        """Whether `train` adds adapters by peft, which is looked for before anything is loaded."""
        return False

    def trained_parameters(self, graph: CouplingGraph) -> int:
        """About how many are trained, for the estimate of memory. By default 0, as for adapters, which are few."""
        return 0

    def train(self, job: RecoveryJob) -> TrainingResult:
        """Train ``job.model``, in place or wrapped, and return it: a transformers model whose parameters have the same
        names and shapes.

        The same job must give the same result: random numbers depend on ``job.settings.seed`` alone. An exception from
        ``job.on_step`` must end the training; training again with the same ``work_dir`` must give the same result as
        without the interruption. Raises `ModelError` for a loss that is not finite, as `fit` does.
        """
        raise NotImplementedError


def nothing(*_: object) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class RecoveryJob:
    """The inputs of a strategy."""

    model: PreTrainedModel
    """The pruned model, which is trained in place."""
    tokenizer: Any
    examples: Sequence[Row]
    validation: Sequence[Row]
    """The loss is measured on these before, during and after the training."""
    graph: CouplingGraph
    """The coupled groups of the pruned model, to choose parameters by their role instead of by name."""
    settings: RecoverSettings
    """What all strategies share, with defaults filled in; a strategy's own settings are its ``self.settings``."""
    work_dir: Path
    """A directory for the state of the training, from which `fit` resumes."""
    teacher: Callable[[], PreTrainedModel]
    """The dense model: on the same device, in the same dtype, in evaluation mode, without gradients. The first call
    loads it, and raises `ModelError` if it can't be opened."""
    predictions: Predictions | None = None
    """Those of the dense model for all rows, which were made before; None where each row is read once."""
    shards_on: torch.device | None = None
    """The device of a sharded training, whose model is loaded on the CPU; None: each process has the whole model."""
    recomputes: bool = False
    """Whether `fit` computes activations of layers again for their gradients, instead of keeping them."""
    on_step: Callable[[int, int, float], object] = nothing
    """Called after each optimizer step with its number from 1, the number of steps, and its loss."""
    on_validation: Callable[[int, float, float], object] = nothing
    """Called after each validation with the number of steps before it, the loss in nats per token, and the standard
    error of its difference from the first; a resumed training repeats those before the interruption."""


@dataclass(frozen=True)
class TrainingResult:
    """The result of a strategy."""

    model: Any
    """As `RecoveryStrategy.train` describes."""
    losses: tuple[float, ...]
    """Of every optimizer step, as means over its trained tokens, including those before an interruption."""
    trainable_parameters: int
    """How many numbers were trained."""


def best_step(validations: Sequence[Mapping[str, Any]]) -> int:
    """The step of the lowest loss; the first, if none is lower than its by more than the error of the difference."""
    start = validations[0]
    helped = [each for each in validations if each["loss"] + each["error"] < start["loss"]]
    best: int = min(helped or [start], key=lambda each: each["loss"])["step"]
    return best
