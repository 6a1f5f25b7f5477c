"""The training loop of strategies: without output, seeded, resumable, with the best weights as its result."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..engine.ranks import Ranks
from ..errors import CheckpointError
from ..models.messages import quiet_transformers
from ..models.shards import names_in
from .base import RecoveryJob
from .best import BestWeights
from .float32 import in_float32
from .memory import recomputing
from .pace import paced
from .schedule import steps
from .sharded import make_whole
from .trackers import tracker_callbacks
from .trainer import Loss, LossTrainer, arguments, validations
from .watching import Watch


def fit(model: Any, job: RecoveryJob, loss: Loss | None = None) -> tuple[float, ...]:
    """Train the parameters of ``model`` that require gradients, in place, and return the loss of every optimizer step.

    ``loss(model, batch)`` returns a scalar with gradients: the mean over the *trained tokens* of a micro batch. Micro
    batches are weighted by their numbers of trained tokens, so that the loss of a step and its gradients are the mean
    over all trained tokens of the step, independent of ``micro_batch_size`` and of the number of processes. ``batch``
    contains tensors on the model's device, dtype int64, of shape (examples, tokens): ``input_ids``,
    ``attention_mask`` (0 on padding) and ``labels`` (−100 on padding and for tokens that are not trained on); and
    ``row`` (examples,), the numbers of the examples in ``job.examples``, and after them in ``job.validation``. The
    logits at position t predict the token at t + 1, so the trained tokens are ``labels[:, 1:] != -100``, at
    ``logits[:, :-1]``. The ``model`` of a loss may be wrapped and is only to be called. By default, the loss is the
    model's own: the cross entropy of the next token, in nats.

    Parameters of 16 bits that require gradients are in float32 meanwhile, and rounded to their dtype once, at the end.
    A model in bfloat16 computes in bfloat16 under autocast, so that a loss sees logits in that dtype.

    With ``job.validation``, the same loss is measured on these rows before the first step, every ``eval_steps`` steps
    and after the last one, without gradients and in evaluation mode; the model has the weights with the lowest one at
    the end. The number of steps may be smaller than planned with ``patience``.

    Continues from the newest complete checkpoint in ``job.work_dir``, with the optimizer, schedule, order of the data
    and random state restored, so that the result is the same as without the interruption. In several processes
    (``torchrun``), all call this, share every batch, and have the result. Raises `ModelError` when the loss is not
    finite, with the rows, and `SettingsError` for a time or a warm-up that does not fit the steps.
    """
    return fit_weights(model, job, loss, float32=True)


def fit_weights(model: Any, job: RecoveryJob, loss: Loss | None = None, *, float32: bool) -> tuple[float, ...]:
    """As `fit`, which is part of the hooks. ``float32``: whether parameters of 16 bits are in float32 meanwhile."""
    best = BestWeights(job.work_dir)
    with contextlib.ExitStack() as block:
        block.enter_context(quiet_transformers())
        block.enter_context(_as_before(model))
        job = block.enter_context(in_float32(model, job, wanted=float32))
        block.enter_context(recomputing(model, job))
        job = paced(model, job, loss)
        total = steps(job.settings, len(job.examples))
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        watch = Watch(best)
        args = arguments(job, job.work_dir, total)
        trainer = LossTrainer(model, job, loss, args, [*tracker_callbacks(job), watch])
        watch.trainer = trainer
        trainer.train(resume_from_checkpoint=Ranks.current().from_first(lambda: latest_checkpoint(job.work_dir)))
        if trainer.sharded:
            make_whole(model)
            for name, parameter in model.named_parameters():
                # Under autocast, accelerate keeps shards in float32.
                parameter.data = parameter.data.to(dtypes[name])
    done = validations(trainer.state.log_history)
    if done:
        lowest = min(done, key=lambda one: one.loss)
        if lowest.step < trainer.state.global_step:
            best.restore(model, lowest.step)
    return tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def latest_checkpoint(work_dir: Path) -> str | None:
    """Path of the newest complete checkpoint; None when there is none. A checkpoint is complete when
    ``trainer_state.json``, which is written last, can be read, and no file of tensors is cut off, as it may be after a
    power failure."""
    complete = []
    for folder in work_dir.glob("checkpoint-*"):
        state = folder / "trainer_state.json"
        if state.is_file() and not any(map(_is_cut_off, folder.iterdir())):
            try:
                complete.append((int(json.loads(state.read_text())["global_step"]), str(folder)))
            except (ValueError, KeyError, TypeError):
                continue
    return max(complete)[1] if complete else None


def _is_cut_off(file: Path) -> bool:
    if file.suffix in (".pt", ".pth"):
        return not zipfile.is_zipfile(file)  # the table is at the end
    if file.suffix == ".safetensors":
        try:
            names_in(file)
        except CheckpointError:
            return True
    return False


@contextlib.contextmanager
def _as_before(model: Any) -> Iterator[None]:
    """A block after which the model is in evaluation mode and uses its cache as before."""
    config = model.config
    use_cache = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        if use_cache is not None:
            config.use_cache = use_cache
        model.eval()
