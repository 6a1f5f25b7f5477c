"""The recover stage: training a pruned model on instruction data."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..engine.ranks import Ranks
from ..errors import PluginError
from ..models.tokenizer import check_ids
from ..models.weights import Weights
from ..progress import QUIET, Progress
from ..settings import RecoverSettings
from ..values import counted
from .base import LayerWalk, RecoveryJob, RecoveryStrategy, TrainingResult, Validation
from .examples import Rows
from .result import RecoveryResult
from .schedule import chosen_in, steps, with_batch
from .training_data import TrainingData
from .work_dir import alone_with, claim, job_identity, writing_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.coupling import CouplingGraph


def recover(
    model: PreTrainedModel,
    tokenizer: Any,
    graph: CouplingGraph,
    data: TrainingData,
    strategy: RecoveryStrategy,
    settings: RecoverSettings,
    work_dir: Path,
    *,
    load_teacher: Callable[[], PreTrainedModel] | None = None,
    layers: tuple[int, ...] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    on_validation: Callable[[Validation], None] | None = None,
    walk: LayerWalk | None = None,
    dense: str | None = None,
    progress: Progress = QUIET,
    changing: AbstractContextManager[None] | None = None,
    check_folder: Callable[[], None] | None = None,
) -> RecoveryResult:
    """Train ``model``, in place, with ``strategy``.

    ``graph``: the coupling graph of ``model``. ``data``: the result of `prepare`. ``settings``: the name of a strategy
    and the settings for it have no effect, as ``strategy`` has its own. ``load_teacher``: loads the dense model, for
    strategies that need it. ``layers``, ``walk``, ``progress``: see `RecoveryJob`. ``on_step``: called after each
    optimizer step with its number from 1, the number of steps, and its loss. ``on_validation``: called after each
    validation. ``dense``: what identifies the dense model, for strategies that need it. ``changing``: active while
    weights change. ``check_folder``: of a caller that has locked ``work_dir`` for this run (`alone_with`), raises where
    the folder was removed or replaced; without it, this function locks the folder. Given in all of several processes,
    or in none.

    When ``work_dir`` contains the state of the same job, training continues from it. Delete the directory once the
    result is saved. Raises `OutputError` when it contains anything else, when another run works in it, and when it is
    removed or replaced meanwhile; `DataError` for data that cannot be used, and `ModelError` when the training
    diverges.

    In several processes, all call this with the same arguments, and each has the result.
    """
    ranks, rows = Ranks.current(), data.rows.rows
    largest = max(max(row["input_ids"]) for row in rows)
    check_ids(torch.tensor([largest]), model)
    if settings.minutes is None:
        settings = with_batch(settings, lambda one: steps(one, len(rows)), ranks.count)
    held_out = data.validation or Rows([], [])
    walk = walk or LayerWalk()
    weights = walk.pruned or Weights(model, graph.layers)
    identity = job_identity(weights, data, strategy, settings, dense)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    started = time.perf_counter()
    with ExitStack() as stack, writing_state(work_dir):
        check_folder = check_folder or alone_with(ranks, work_dir, stack).check
        ranks.from_first(lambda: claim(work_dir, identity))
        reports = _Reports(check_folder, on_step, on_validation)
        job = RecoveryJob(
            model, tokenizer, rows, graph, settings, work_dir, reports.stepped, load_teacher, layers, walk=walk,
            validation=held_out.rows, on_validation=reports.validated,
            places=[*data.rows.places, *held_out.places], progress=progress, check_folder=check_folder,
        )  # fmt: skip
        with changing or nullcontext():
            result = strategy.train(job)
        check_folder()
        chosen = ranks.from_first(lambda: chosen_in(work_dir))
    seconds = time.perf_counter() - started
    if chosen:
        settings = settings.model_copy(update={"batch_size": chosen["batch_size"]})
    if not isinstance(result, TrainingResult):
        raise PluginError(f"recovery strategy '{strategy.name}' returned {type(result).__name__}, not a TrainingResult")
    trained = merge_adapters(result.model) if settings.merge else result.model
    if not hasattr(trained, "peft_config"):
        trained.requires_grad_(True)
        for name in frozen:
            trained.get_parameter(name).requires_grad_(False)
    return RecoveryResult(
        trained.eval(),
        strategy,
        settings,
        result.losses,
        seconds,
        len(rows),
        data.source,
        data.fingerprint,
        result.trainable_parameters,
        (*result.notes, *data.notes, *_validation_notes(strategy, settings, result, held_out, reports.validations)),
        tuple(reports.validations),
        len(held_out.rows),
        result.details,
    )


class _Reports:
    """Hands the reports of a strategy to the caller of `recover`. The folder is checked first, as the strategy writes
    there after its report."""

    def __init__(
        self,
        check_folder: Callable[[], None],
        on_step: Callable[[int, int, float], None] | None,
        on_validation: Callable[[Validation], None] | None,
    ) -> None:
        self._check_folder, self._on_step, self._on_validation = check_folder, on_step, on_validation
        self.validations: list[Validation] = []

    def stepped(self, number: int, total: int, loss: float) -> None:
        self._check_folder()
        if self._on_step is not None:
            self._on_step(number, total, loss)

    def validated(self, step: int, loss: float, perplexity: float | None) -> None:
        self._check_folder()
        self.validations.append(Validation(step, loss, perplexity))
        if self._on_validation is not None:
            self._on_validation(self.validations[-1])


def _validation_notes(
    strategy: RecoveryStrategy,
    settings: RecoverSettings,
    result: TrainingResult,
    held_out: Rows,
    done: list[Validation],
) -> list[str]:
    """Notes for the user."""
    if not held_out.rows:
        return []
    if not done:
        return [f"{strategy.label()} measures no validation loss; --validation 0 trains on all examples"]
    notes, best, last = [], min(done, key=lambda one: one.loss), done[-1]
    if settings.patience is not None and done.index(best) + settings.patience == len(done) - 1 and best is not last:
        notes.append(f"stopped after step {last.step}: {counted(settings.patience, 'validation')} without a lower loss")
    if best.step < len(result.losses):
        when = f"after step {best.step}" if best.step else "before the training"
        notes.append(f"the validation loss was lowest {when}; the result has the weights of then")
    return notes


def merge_adapters(model: Any) -> Any:
    """The base model of a peft model, with the adapters added to its weights; any other model unchanged."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
