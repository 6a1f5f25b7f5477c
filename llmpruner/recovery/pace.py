"""How many steps fit into the time that a training may take, and of how many examples."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import TrainerCallback

from ..engine.ranks import Ranks
from ..errors import SettingsError
from ..files import write_text
from ..settings import RecoverSettings
from .base import RecoveryJob
from .schedule import PACE_FILE, chosen_in, micro_batch, seconds_of_saving, validation_steps, with_batch
from .trainer import Loss, LossTrainer, arguments

_TRIAL, _NOT_COUNTED, _ENOUGH = 4, 1, 5.0
"""Steps of a trial, of one micro-batch each; how many of them, the first, are not counted, as they compile kernels and
allocate memory; and the seconds of counted ones that end it early."""
_SHARE = 0.97
"""Of the time that is planned for."""


@dataclass(frozen=True)
class Pace:
    """Seconds of an example in all processes together, forwards and backwards; of an optimizer step beside its
    examples; of a validation on so many ``rows``; and of saving the state of the training."""

    example: float
    update: float
    validation: float
    saving: float
    rows: int = 0

    def seconds(self, count: int, settings: RecoverSettings) -> float:
        """Of ``count`` steps with the validations and savings among them."""
        checks = 1 + math.ceil(count / validation_steps(settings, count, self.rows)) if self.rows else 0
        computing = count * self._step(settings) + checks * self.validation
        return computing + seconds_of_saving(self.saving, computing, count)

    def _step(self, settings: RecoverSettings) -> float:
        return settings.batch_size * self.example + self.update

    def count(self, seconds: float, settings: RecoverSettings) -> int:
        """The largest number of steps within ``seconds``; 0 where not even one is."""
        low, high = 0, max(1, int(seconds / self._step(settings)) + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.seconds(middle, settings) <= seconds else (low, middle - 1)
        return low


def paced(model: Any, job: RecoveryJob, loss: Loss | None) -> RecoveryJob:
    """``job`` with the number of optimizer steps and the batch size that fit into ``minutes``, where they are given.
    Both are chosen once and kept in ``job.work_dir``, so that a continued training has the same learning rates.

    Raises `SettingsError` where the time does not suffice for a step.
    """
    ranks = Ranks.current()
    if job.settings.minutes is None:
        return job
    known = ranks.from_first(lambda: chosen_in(job.work_dir))
    if not known:
        pace = _timed(model, job, loss)
        known = ranks.from_first(lambda: _chosen(pace, job, job.settings.minutes or 0.0))
    return replace(job, settings=job.settings.model_copy(update=known))


def _chosen(pace: Pace, job: RecoveryJob, minutes: float) -> dict[str, int]:
    left = _SHARE * 60 * minutes - (time.monotonic() - job.began)
    settings = with_batch(job.settings, lambda settings: pace.count(left, settings), Ranks.current().count)
    count = pace.count(left, settings)
    if count == 0:
        raise SettingsError(
            f"--minutes {minutes:g} does not suffice: after the trial steps {max(left, 0.0):.0f} s are left, and the "
            f"shortest training takes {pace.seconds(1, settings):.1f} s; give more"
        )
    count = min(count, settings.max_steps or count)
    found = {"steps": count, "batch_size": settings.batch_size, "seconds": asdict(pace)}
    job.check_folder()
    write_text(job.work_dir / PACE_FILE, json.dumps(found, indent=2) + "\n")
    return chosen_in(job.work_dir)


def _timed(model: Any, job: RecoveryJob, loss: Loss | None) -> Pace:
    """The pace of a few steps, after which the weights are what they were."""
    weights = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
    folder = job.work_dir / "trial"
    processes = Ranks.current().count
    micro = micro_batch(job.settings, processes)
    args = arguments(job, folder, _TRIAL, accumulate=1)
    args.save_steps = _TRIAL
    clock = _Clock()
    trainer = LossTrainer(model, job, loss, args, [clock])
    if trainer.sharded:
        raise SettingsError("--minutes cannot be used with FSDP; give --max-steps")
    clock.trainer = trainer
    try:
        trainer.train()
        began = clock.now()
        if job.validation:
            trainer.evaluate()
        validation = clock.now() - began
        example = clock.token_seconds() * _tokens_of_an_example(job, micro) / processes
        return Pace(example, clock.update_seconds(), validation, trainer.saving_seconds, len(job.validation))
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
                parameter.grad = None
        if trainer.ranks.first:
            shutil.rmtree(folder, ignore_errors=True)


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Times the micro-batches of every step, and what comes after them; ends the training after enough of them."""

    trainer: LossTrainer

    def __init__(self) -> None:
        self._inside: list[tuple[float, int]] = []
        self._beside: list[float] = []
        self._began = self._computed = 0.0

    def now(self) -> float:
        if self.trainer.args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, state, control
        self._began = self.now()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, state, control
        self._computed = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, state
        self._inside.append((self._computed - self._began, self.trainer.tokens))
        self._beside.append(self.now() - self._computed)
        counted = [seconds for seconds, _ in self._inside[_NOT_COUNTED:]]
        if counted and sum(counted) >= _ENOUGH:
            control.should_training_stop = control.should_save = True

    def token_seconds(self) -> float:
        """Of a token in this process, padding included."""
        seconds, tokens = (sum(column) for column in zip(*self._inside[_NOT_COUNTED:], strict=True))
        return float(seconds / tokens)

    def update_seconds(self) -> float:
        beside = self._beside[_NOT_COUNTED:]
        return sum(beside) / len(beside)


def _tokens_of_an_example(job: RecoveryJob, micro: int) -> float:
    """Mean, padding included, in micro-batches of ``micro`` examples in random order."""
    lengths = [len(row["input_ids"]) for row in job.examples]
    random.Random(job.settings.seed).shuffle(lengths)
    whole = [lengths[first : first + micro] for first in range(0, len(lengths), micro)]
    return sum(map(max, whole)) / len(whole)
