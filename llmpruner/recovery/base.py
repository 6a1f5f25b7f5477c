"""RecoveryStrategy: a training that restores the quality of a pruned model. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component
from ..errors import ModelError
from ..settings import RecoverSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.coupling import CouplingGraph


@dataclass(frozen=True)
class RecoveryJob:
    """What a strategy is given.

    ``examples``: rows of ``input_ids`` and ``labels``, lists of integers of one length, not padded; a label is the
    token at its own place, or −100 where nothing is to be learnt. ``graph``: the coupled groups of the pruned model, to
    choose parameters by their role instead of by name. ``settings``: what all strategies share, from
    ``learning_rate`` to ``seed``; a strategy's own settings are its ``self.settings``. ``work_dir``: exists, and is
    kept until the result is saved; checkpoints of the training go there, to resume from. ``on_step``: to be called
    after each optimizer step with its number from 1, the number of steps, and its loss. ``load_teacher``: see
    `teacher`.
    """

    model: PreTrainedModel
    tokenizer: Any
    examples: Sequence[Mapping[str, list[int]]]
    graph: CouplingGraph
    settings: RecoverSettings
    work_dir: Path
    on_step: Callable[[int, int, float], None] | None = None
    load_teacher: Callable[[], PreTrainedModel] | None = None

    def teacher(self) -> PreTrainedModel:
        """The dense model that the pruned one was made from: on the same device, in the same dtype, in evaluation mode,
        without gradients. Loaded by the first call; later ones return the same object.

        Raises `ModelError` when it cannot be found.
        """
        return self._teacher

    @cached_property
    def _teacher(self) -> PreTrainedModel:
        if self.load_teacher is None:
            raise ModelError("the dense model is not known to this recovery, and its strategy needs one")
        dense = self.load_teacher()
        return dense.to(device=self.model.device, dtype=self.model.dtype).eval().requires_grad_(False)


@dataclass(frozen=True)
class TrainingResult:
    """What a strategy returns. ``model``: as `RecoveryStrategy.train` says. ``losses``: of every optimizer step, those
    before an interruption included. ``notes``: what the user should know, one line each."""

    model: Any
    losses: tuple[float, ...]
    trainable_parameters: int
    notes: tuple[str, ...] = ()


class RecoveryStrategy(Component):
    """Trains a pruned model.

    A strategy with a loss of its own hands it to the training loop that the built-in ones use::

        class Imitation(RecoveryStrategy):
            name = "imitation"
            summary = "trains every parameter on the squared difference of the logits from the dense model's"

            def train(self, job):
                teacher = job.teacher()

                def loss(model, batch):
                    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
                    difference = model(**inputs).logits - teacher(**inputs).logits
                    return difference[:, :-1][batch["labels"][:, 1:] != -100].square().mean()

                job.model.requires_grad_(True)
                return TrainingResult(job.model, fit(job.model, job, loss), job.model.num_parameters())
    """

    kind: ClassVar[str] = "recovery strategy"
    adapters: ClassVar[bool] = False
    """Whether `train` returns a peft model, whose adapters can be saved alone."""

    def train(self, job: RecoveryJob) -> TrainingResult:
        """Train ``job.model``, in place or wrapped, and return it: a plain transformers model with the names and shapes
        of parameters that it had, or a peft model, whose adapters are then merged (or saved alone, with
        ``--no-merge``).

        The same job gives the same result: every random number is drawn from ``job.settings.seed``. An exception of
        ``job.on_step`` ends the training; run again with the same ``work_dir``, it ends as if it had not been
        interrupted.
        """
        raise NotImplementedError
