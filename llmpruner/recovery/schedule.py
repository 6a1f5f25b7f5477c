"""The steps of a training, from its settings: how many, of which batches, and when it is validated and saved. No torch
is imported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError, SettingsError

if TYPE_CHECKING:
    from ..settings import RecoverSettings

PACE_FILE = "pace.json"
"""In the folder of a training with ``minutes``: what `chosen_in` returns, and the seconds that it follows from."""
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""``--schedule`` → its name in transformers."""
_BATCHES, _STEPS = (64, 32, 16, 8, 4, 2), 200
"""Examples per optimizer step, where the user gives no number: as many as leave so many steps, or the fewest."""
_VALIDATIONS, _VALIDATION_SHARE = 10, 0.1
_CHEAP_SAVING, _SAVING_SHARE = 0.5, 1 / 30
"""Seconds within which a state is saved by the number of steps alone; else the share of the time that it may take."""


def steps(settings: RecoverSettings, examples: int) -> int:
    """Number of optimizer steps, where no time is given; the last batch of an epoch may be smaller than the others."""
    if settings.max_steps is not None:
        return settings.max_steps
    return math.ceil(settings.epochs * math.ceil(examples / settings.batch_size))


def with_batch(settings: RecoverSettings, count: Callable[[RecoverSettings], int], processes: int) -> RecoverSettings:
    """``settings`` with a batch size, where the user gave neither it nor ``max_steps``: the largest with which the
    training has 200 steps, and at least 2. A few hundred thousand tokens, as are trained on in minutes, restore more in
    many small steps than in a few large ones. ``count``: of the steps of a training with settings. The batch is a
    multiple of ``processes``."""
    sizes = [size for size in _BATCHES if size % processes == 0]
    if "batch_size" in settings.model_fields_set or settings.max_steps is not None or not sizes:
        return settings
    choices = [settings.model_copy(update={"batch_size": size}) for size in sizes]
    return next((one for one in choices if count(one) >= _STEPS), choices[-1])


def validation_steps(settings: RecoverSettings, total: int, rows: int) -> int:
    """Optimizer steps from one validation, on ``rows`` examples, to the next. By default there are so many validations
    that they take a tenth of the time of a training, in which every example is computed forwards and backwards (three
    times the work); at most ten, and at least one."""
    if settings.eval_steps is not None:
        return settings.eval_steps
    affordable = int(_VALIDATION_SHARE * 3 * total * settings.batch_size / rows)
    return math.ceil(total / max(1, min(_VALIDATIONS, affordable)))


def saving_steps(total: int) -> int:
    """Optimizer steps from one saved state to the next, where saving takes little time; see `worth_saving`."""
    return max(1, min(50, total // 10))


def worth_saving(saving: float, since: float) -> bool:
    """Whether the state of a training is to be saved, ``since`` seconds after it was last: saving it takes ``saving``
    seconds, which may be a share of the time beside. The weights of a whole model, with those of its optimizer, are
    many times larger than adapters."""
    return saving < _CHEAP_SAVING or since * _SAVING_SHARE >= saving


def seconds_of_saving(saving: float, beside: float, total: int) -> float:
    """All that is saved in a training of ``total`` steps and ``beside`` seconds, by `worth_saving`."""
    every = total // saving_steps(total) * saving
    return every if saving < _CHEAP_SAVING else min(every, saving + beside * _SAVING_SHARE)


def micro_batch(settings: RecoverSettings, processes: int = 1) -> int:
    """The largest number of examples within ``micro_batch_size`` that divides the part of ``batch_size`` which each of
    ``processes`` has. Raises `SettingsError` where they cannot share a batch."""
    part, rest = divmod(settings.batch_size, processes)
    if rest:
        raise SettingsError(
            f"--batch-size {settings.batch_size} cannot be shared by {processes} processes; give a multiple of "
            f"{processes}"
        )
    sizes = range(1, min(settings.micro_batch_size, part) + 1)
    return max(size for size in sizes if part % size == 0)


def warmup_steps(settings: RecoverSettings, total: int) -> int:
    """The steps of a training of ``total`` over which the learning rate rises. Raises `SettingsError` for as many as
    the training has."""
    if settings.warmup_steps is None:
        return min(100, total // 10)
    if settings.warmup_steps and settings.warmup_steps >= total:
        raise SettingsError(
            f"--warmup-steps {settings.warmup_steps}: the training has {total} steps, so the learning rate would not "
            "reach its peak; give fewer"
        )
    return settings.warmup_steps


def chosen_in(work_dir: Path) -> dict[str, int]:
    """The fields of `RecoverSettings` that were chosen for a training with ``minutes``; empty before, and without."""
    file = work_dir / PACE_FILE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
        return {"max_steps": int(found["steps"]), "batch_size": int(found["batch_size"])}
    except (ValueError, KeyError, TypeError):
        raise OutputError(f"{file} is damaged; delete {file.parent} and start again") from None
