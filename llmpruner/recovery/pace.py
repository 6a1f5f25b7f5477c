"""How many steps fit into the time that a training may take."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..engine.ranks import Ranks
from ..errors import OutputError, SettingsError
from ..files import write_text
from ..settings import RecoverSettings
from .base import RecoveryJob
from .schedule import micro_batch, seconds_of_saving, steps, validation_steps
from .trainer import Loss, LossTrainer, arguments

_FILE = "pace.json"
_TRIAL, _NOT_COUNTED = 4, 1
"""Steps of a trial, and how many of them, the first, are not counted: they compile kernels and allocate memory."""
_MICRO_BATCHES = 2
"""Per step of a trial, at most; the time of a step follows from that of its micro-batches."""
_SHARE = 0.97
"""Of the time that is planned for."""


@dataclass(frozen=True)
class Pace:
    """Seconds of an optimizer step, of a validation on so many ``rows``, and of saving the state of the training."""

    step: float
    validation: float
    saving: float
    rows: int = 0

    def seconds(self, count: int, settings: RecoverSettings) -> float:
        """Of ``count`` steps with the validations and savings among them."""
        checks = 1 + math.ceil(count / validation_steps(settings, count, self.rows)) if self.rows else 0
        computing = count * self.step + checks * self.validation
        return computing + seconds_of_saving(self.saving, computing, count)

    def count(self, seconds: float, settings: RecoverSettings) -> int:
        """The largest number of steps within ``seconds``; 0 where not even one is."""
        low, high = 0, max(1, int(seconds / self.step) + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.seconds(middle, settings) <= seconds else (low, middle - 1)
        return low


def steps_to_take(model: Any, job: RecoveryJob, loss: Loss | None) -> int:
    """The number of optimizer steps. With ``minutes``, it is chosen once and kept in ``job.work_dir``, so that a
    continued training has the same learning rates.

    Raises `SettingsError` where the time does not suffice for a step.
    """
    settings, ranks = job.settings, Ranks.current()
    if settings.minutes is None:
        return steps(settings, len(job.examples))
    file = job.work_dir / _FILE
    known = ranks.from_first(lambda: _read(file))
    if known is None:
        pace = _timed(model, job, loss)
        known = ranks.from_first(lambda: _chosen(pace, job, settings.minutes or 0.0, file))
    return known


def _read(file: Path) -> int | None:
    if not file.is_file():
        return None
    try:
        return int(json.loads(file.read_text())["steps"])
    except (ValueError, KeyError, TypeError):
        raise OutputError(f"{file} is damaged; delete {file.parent} and start again") from None


def _chosen(pace: Pace, job: RecoveryJob, minutes: float, file: Path) -> int:
    settings = job.settings
    left = _SHARE * 60 * minutes - (time.monotonic() - job.began)
    count = pace.count(left, settings)
    if count == 0:
        raise SettingsError(
            f"--minutes {minutes:g} does not suffice: after the trial steps {max(left, 0.0):.0f} s are left, and the "
            f"shortest training takes {pace.seconds(1, settings):.1f} s; give more"
        )
    count = min(count, settings.max_steps or count)
    write_text(file, json.dumps({"steps": count, "seconds": asdict(pace)}, indent=2) + "\n")
    return count


def _timed(model: Any, job: RecoveryJob, loss: Loss | None) -> Pace:
    """The pace of a few steps, after which the weights are what they were."""
    weights = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
    folder = job.work_dir / "trial"
    processes = Ranks.current().count
    micro = micro_batch(job.settings, processes)
    accumulated = job.settings.batch_size // (micro * processes)
    args = arguments(job, folder, _TRIAL, accumulate=min(accumulated, _MICRO_BATCHES))
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
        return Pace(
            clock.step_seconds(_tokens_of_a_step(job, micro, accumulated)),
            validation,
            trainer.saving_seconds,
            len(job.validation),
        )
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
                parameter.grad = None
        if trainer.ranks.first:
            shutil.rmtree(folder, ignore_errors=True)


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Times the micro-batches of every step, and what comes after them."""

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
        del args, state, control
        self._inside.append((self._computed - self._began, self.trainer.tokens))
        self._beside.append(self.now() - self._computed)

    def step_seconds(self, tokens: float) -> float:
        """Of a step with so many tokens, padding included."""
        seconds, counted = (sum(column) for column in zip(*self._inside[_NOT_COUNTED:], strict=True))
        beside = self._beside[_NOT_COUNTED:]
        return float(tokens * seconds / counted + sum(beside) / len(beside))


def _tokens_of_a_step(job: RecoveryJob, micro: int, accumulated: int) -> float:
    """Mean number of tokens, padding included, in ``accumulated`` micro-batches of examples in random order."""
    lengths = [len(row["input_ids"]) for row in job.examples]
    random.Random(job.settings.seed).shuffle(lengths)
    whole = [lengths[first : first + micro] for first in range(0, len(lengths), micro)]
    return accumulated * micro * sum(map(max, whole)) / len(whole)
