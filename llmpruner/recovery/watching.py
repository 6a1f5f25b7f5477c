"""What happens beside the steps of a training: reports, validations, and stopping early or at a loss that is not
finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from ..errors import ModelError
from .base import Validation
from .best import BestWeights
from .schedule import validation_steps
from .trainer import LossTrainer, validations

_MOST_NAMED = 8
"""Rows that a message names."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """Reports losses to the job, validates and keeps the best weights, and stops where there is reason to.

    transformers' EarlyStoppingCallback is not used: its count would begin anew in a continued training.
    """

    trainer: LossTrainer

    def __init__(self, best: BestWeights) -> None:
        self._best = best
        self._needed: int | None = None
        """The step of the best weights when the newest checkpoint was saved, which goes on with them."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        if self.trainer.job.validation and state.global_step == 0:
            self.trainer.evaluate()
            return
        earlier = validations(state.log_history)
        self._needed = _best_step(earlier)
        for done in earlier:
            self._report(done)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args
        step, total, job = state.global_step, state.max_steps, self.trainer.job
        if job.validation:
            control.should_evaluate = (
                step % validation_steps(job.settings, total, len(job.validation)) == 0 or step == total
            )
        if step == total:
            # A continued training takes at least one step.
            control.should_save = False
        if control.should_save:
            # Clocks of processes differ, and all of them save.
            control.should_save = self.trainer.ranks.from_first(self.trainer.worth_saving)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        del args, control
        loss, job = (logs or {}).get("loss"), self.trainer.job
        if loss is None:
            return
        if not math.isfinite(loss):
            raise ModelError(f"the loss became {loss} at step {state.global_step}{self._cause()}")
        if job.on_step is not None:
            job.on_step(state.global_step, state.max_steps, loss)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args
        done = validations(state.log_history)
        if not math.isfinite(done[-1].loss):
            raise ModelError(
                f"the validation loss became {done[-1].loss} at step {state.global_step}; lower the learning rate, or "
                "use float32 weights"
            )
        self._report(done[-1])
        best = min(done, key=lambda one: one.loss)
        if best is done[-1] and best.step < state.max_steps:
            # Before, so that there are two files at most.
            self._best.drop_all_but(self._needed)
            self._best.keep(self.trainer.model, best.step)
        patience = self.trainer.job.settings.patience
        if patience is not None and len(done) - 1 - done.index(best) >= patience:
            control.should_training_stop = True
            control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        self._needed = _best_step(validations(state.log_history))
        if self._needed is not None:
            self._best.drop_all_but(self._needed)

    def _report(self, done: Validation) -> None:
        if self.trainer.job.on_validation is not None:
            self.trainer.job.on_validation(done.step, done.loss, done.perplexity)

    def _cause(self) -> str:
        """The rows of the micro-batches whose loss is not finite, and what to do."""
        trainer, job = self.trainer, self.trainer.job
        bad = [rows.tolist() for rows, part in trainer.parts if not part.isfinite().all()]
        wrong, whole = trainer.ranks.totals(float(len(bad)), float(len(trainer.parts)))
        rows = sorted(trainer.ranks.merged({row: True for each in bad for row in each}))
        named, more = rows[:_MOST_NAMED], len(rows) - _MOST_NAMED
        numbers = ", ".join(str(row + 1) for row in named) + (f" and {more} more" if more > 0 else "")
        places = f" ({'; '.join(job.places[row] for row in named)})" if job.places else ""
        # Weights that are not finite any more spoil every micro-batch, a row that is at fault only its own.
        look = "look at them, " if wrong < whole else ""
        return f", with the rows {numbers} of the data{places}; {look}lower the learning rate, or use float32 weights"


def _best_step(done: Sequence[Validation]) -> int | None:
    return min(done, key=lambda one: one.loss).step if done else None
