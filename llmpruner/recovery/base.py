"""RecoveryStrategy: a training that restores the quality of a pruned model. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component
from ..errors import ModelError
from ..progress import QUIET, Progress
from ..settings import RecoverSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..models.weights import Weights
    from ..structure.coupling import CouplingGraph


@dataclass(frozen=True)
class LayerWalk:
    """How models are run layer by layer. ``pruned``: the weights of the pruned model where they are read from its
    files; None where they are in memory. ``open_dense``: opens those of the dense model where these are read from its
    files; None where `RecoveryJob.teacher` loads it. ``boundary_memory``: bytes of hidden states in memory; those
    beyond are in a file in the job's ``work_dir``."""

    pruned: Weights | None = None
    open_dense: Callable[[], Weights] | None = None
    boundary_memory: int | None = None


@dataclass(frozen=True)
class RecoveryJob:
    """The inputs of a strategy.

    ``examples``: rows of ``input_ids`` and ``labels``, lists of integers of equal length, not padded; a label is the
    token at the same position, or −100 for tokens that are not trained on. ``graph``: the coupled groups of the pruned
    model, to choose parameters by their role instead of by name. ``settings``: those that all strategies share, from
    ``learning_rate`` to ``seed``; a strategy's own settings are its ``self.settings``. With ``minutes``, the number of
    steps and, unless it was given, the batch size are chosen by `fit`. ``work_dir``: an existing directory for the
    state of the training, to resume from; kept until the result is saved. ``on_step``: to be called after each
    optimizer step with its number from 1, the number of steps, and its loss. ``load_teacher``: see
    `teacher`. ``layers``: for every decoder layer, its number in the dense model; None where no layer was removed.
    ``validation``: rows of the same form that are not trained on; empty without validation. ``on_validation``: to be
    called after each validation with the number of steps taken, the loss, and the perplexity where the loss is the
    cross entropy of the next token (else None); in a continued training, also for the validations before. ``places``:
    where each of ``examples``, and after them of ``validation``, is from, for messages; empty where it is not known.
    ``began``: the `time.monotonic` from which ``settings.minutes`` are counted.
    ``walk``: for strategies that train `RecoveryStrategy.by_layer` or `RecoveryStrategy.streams_dense`, where weights
    and hidden states are. ``progress``: for work before the first step. ``check_folder``: raises `OutputError`
    where ``work_dir`` was removed or replaced meanwhile; ``on_step`` and ``on_validation`` do it, too.
    ``dtype``: of the model as it came, which `fit` changes for a while; None (the default) takes that of ``model``.
    """

    model: PreTrainedModel
    tokenizer: Any
    examples: Sequence[Mapping[str, list[int]]]
    graph: CouplingGraph
    settings: RecoverSettings
    work_dir: Path
    on_step: Callable[[int, int, float], None] | None = None
    load_teacher: Callable[[], PreTrainedModel] | None = None
    layers: tuple[int, ...] | None = None
    validation: Sequence[Mapping[str, list[int]]] = ()
    on_validation: Callable[[int, float, float | None], None] | None = None
    places: Sequence[str] = ()
    began: float = field(default_factory=time.monotonic)
    walk: LayerWalk = LayerWalk()
    progress: Progress = QUIET
    check_folder: Callable[[], None] = field(default_factory=lambda: _unchecked)
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.dtype is None:
            object.__setattr__(self, "dtype", self.model.dtype)

    def teacher(self) -> PreTrainedModel:
        """The dense model that the pruned one was made from: on the same device, in ``dtype``, in evaluation mode,
        without gradients. Loaded by the first call; later ones return the same object.

        Raises `ModelError` when it cannot be found.
        """
        return self._teacher

    def free_teacher(self) -> None:
        """Free the memory of the dense model; a later `teacher` loads it again."""
        self.__dict__.pop("_teacher", None)

    @cached_property
    def _teacher(self) -> PreTrainedModel:
        if self.load_teacher is None:
            raise ModelError("the recovery strategy needs the dense model, which is not known here")
        dense = self.load_teacher()
        return dense.to(device=self.model.device, dtype=self.dtype).eval().requires_grad_(False)


def _unchecked() -> None:
    """For a ``work_dir`` of which nothing is known."""


@dataclass(frozen=True)
class Validation:
    """The loss on the validation examples after ``step`` optimizer steps: that which is trained on, as a mean over
    their trained tokens (nats per token for cross entropies and divergences). ``perplexity``: exp of the loss; None
    where the loss is not the cross entropy of the next token."""

    step: int
    loss: float
    perplexity: float | None = None

    def __str__(self) -> str:
        perplexity = "" if self.perplexity is None else f", perplexity {self.perplexity:.2f}"
        return f"step {self.step}: validation loss {self.loss:.4f}{perplexity}"


@dataclass(frozen=True)
class TrainingResult:
    """The result of a strategy. ``model``: see `RecoveryStrategy.train`. ``losses``: of every optimizer step, as means
    over its trained tokens, including those before an interruption. ``trainable_parameters``: how many numbers were
    trained. ``notes``: messages for the user, one line each. ``details``: further JSON values for the record."""

    model: Any
    losses: tuple[float, ...]
    trainable_parameters: int
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


class RecoveryStrategy(Component):
    """Trains a pruned model.

    A strategy with its own loss can pass it to the training loop of the built-in ones::

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
    by_layer: ClassVar[bool] = False
    """Whether `train` uses one layer at a time, by ``job.walk``, so that models need not be in memory as a whole."""
    needs_dense: ClassVar[bool] = False
    """Whether `train` uses the dense model, so that a recovery without one is refused before anything is loaded."""

    in_float32: ClassVar[bool] = True
    """Whether `trained_parameters` of 16 bits are in float32 while they are trained, as `fit` has them, for the
    forecast."""
    streams_dense: ClassVar[bool] = False
    """Whether `train` needs the dense model before the training alone, and can run it layer by layer, by
    ``job.walk.open_dense``, where it does not fit into memory beside the pruned one."""

    def check(self, graph: CouplingGraph, cut: Collection[str]) -> None:
        """Raise `UnsupportedModelError` for a model that `train` cannot train, before its weights are read. ``graph``:
        as in `RecoveryJob`; ``cut``: the kinds of units that were removed from the dense model. Checks nothing by
        default."""

    def trained_parameters(self, graph: CouplingGraph) -> int:
        """About how many parameters of the model with ``graph`` have gradients and moments of an optimizer in memory,
        for the forecast. By default 0, as of adapters, which are few."""
        return 0

    def train(self, job: RecoveryJob) -> TrainingResult:
        """Train ``job.model``, in place or wrapped, and return it: a transformers model with the same names and shapes
        of parameters, or a peft model, whose adapters are then merged (or saved alone, with ``--no-merge``).

        The same job must give the same result: random numbers depend on ``job.settings.seed`` alone. An exception from
        ``job.on_step`` must end the training; training again with the same ``work_dir`` must give the same result as
        without the interruption.

        Raises `ModelError` for a loss that is not finite, as `fit` does, and where the dense model is needed and not
        known.
        """
        raise NotImplementedError
