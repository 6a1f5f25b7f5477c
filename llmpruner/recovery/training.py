"""`fit`, the training loop: prepare → steps, validations and checkpoints → the weights of the lowest held-out loss."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from ..calibration.chat import IGNORED
from ..errors import ModelError, SettingsError
from ..files import write_text
from ..models.messages import quiet_transformers
from ..models.numbers import autocast_to
from ..models.tokenizer import with_padding
from ..settings import RecoverSettings
from .base import RecoveryJob, TrainingResult, best_step
from .losses import Batch, Loss, next_token_loss, trained_tokens
from .precision import as_saved, in_float32
from .sharding import load_shards, save_shards


def fit(model: Any, job: RecoveryJob, loss: Loss | None = None) -> TrainingResult:
    """Train the parameters of ``model`` that require gradients, in place. Returns what `RecoveryStrategy.train` does.

    ``loss(model, batch)`` returns a scalar with gradients, the mean over the *trained tokens* of a micro-batch; by
    default the cross entropy of the next token, in nats. Its ``model`` may be wrapped, and is only to be called.
    ``batch`` has int64 tensors (examples, tokens) on the model's device: ``input_ids``, ``attention_mask`` (0 on
    padding) and ``labels`` (−100 on padding and for tokens that are not trained on). The logits at position t predict
    the token at t + 1, so the trained tokens are ``labels[:, 1:] != -100``, at ``logits[:, :-1]``. Micro-batches are
    weighted by their trained tokens, so that steps do not depend on their size and the number of processes.

    Trained parameters of 16 bits are in float32 meanwhile, and rounded once, at the end. A model in bfloat16, frozen
    weights in float16, and a model on a device that is faster so compute in bfloat16 under autocast, if they can: a
    loss sees logits in that dtype.

    The same loss is measured on each row of ``job.validation``, without gradients, in evaluation mode, with adapters
    of 16-bit weights merged, as merging rounds. The model ends with the weights of the lowest loss, or with those of
    the start if none is lower by more than its error.

    Resumes from the newest complete checkpoint in ``job.work_dir``, with the same result as without the interruption
    (``minutes`` aside). In several processes, all call this, share every batch, and have the result. Raises
    `ModelError` when the loss is not finite.
    """
    use_cache = getattr(model.config, "use_cache", False)
    try:
        if use_cache:
            model.config.use_cache = False
        with quiet_transformers(), in_float32(model, job) as (trained, autocast, widened):
            # Weights that autocast converts are kept with the activations; shards would be of little use.
            if (job.recomputes or (autocast and job.shards_on is not None)) and model.supports_gradient_checkpointing:
                trained.activation_checkpointing_enable({"use_reentrant": False})
            losses = _Training(trained, job, loss or next_token_loss, autocast, widened).run()
    finally:
        if use_cache:
            model.config.use_cache = use_cache
        if job.recomputes:
            model.activation_checkpointing_disable()
        model.eval()
    return TrainingResult(model, tuple(losses), sum(p.numel() for p in model.parameters() if p.requires_grad))


@dataclass
class _State:
    """How far a training is; a checkpoint has it in ``state.json``, which is written last."""

    losses: list[float] = field(default_factory=list)  # of each step
    validations: list[dict[str, Any]] = field(default_factory=list)  # step, loss, and error of its difference
    start: list[float] = field(default_factory=list)  # of the first validation: each row's loss, summed over its tokens
    seconds: float = 0.0
    validation_seconds: float = 0.0  # of the last validation

    @property
    def step(self) -> int:
        return len(self.losses)


class _Training:
    """A training in `run`, from its start or from a checkpoint to its end."""

    def __init__(self, model: Any, job: RecoveryJob, loss: Loss, autocast: bool, widened: Mapping[Any, Any]) -> None:
        self.model, self.job, self.loss, self.widened, settings = model, job, loss, widened, job.settings
        assert settings.batch_size is not None and settings.learning_rate is not None, "filled in"
        self.steps, self.minutes = planned_steps(settings, len(job.examples)), settings.minutes
        self.trained, self.peak = self.steps * settings.batch_size, settings.learning_rate
        # Not accelerate's, which converts all logits to float32 and does not reach a second model in the loss.
        self.precision = partial(
            autocast_to, model.device.type, torch.bfloat16, enabled=autocast, caches=job.shards_on is None
        )
        self.state, self.began = _State(), time.monotonic()
        set_seed(settings.seed)
        self.accelerator = _accelerator(model.device, settings.seed)
        part = settings.batch_size // self.accelerator.num_processes
        micro = max(size for size in range(1, min(settings.micro_batch_size, part) + 1) if part % size == 0)
        self.accumulated = part // micro
        self.collate = DataCollatorForSeq2Seq(with_padding(job.tokenizer, model), label_pad_token_id=IGNORED)
        examples: Any = job.examples
        self.loader = self.accelerator.prepare(DataLoader(examples, micro, shuffle=True, collate_fn=self.collate))
        self.wrapped, self.optimizer = (
            model,
            torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0, fused=True),
        )
        if job.shards_on is None:
            self.wrapped, self.optimizer = self.accelerator.prepare(model, self.optimizer)
            self.accelerator.register_save_state_pre_hook(self.select_weights)
            self.accelerator.register_load_state_pre_hook(self.load_weights)

    def run(self) -> list[float]:
        """Train, and leave the model with the weights of the lowest held-out loss. Returns the loss of each step."""
        (checkpoint,) = broadcast_object_list([latest_checkpoint(self.job.work_dir)])
        if checkpoint:
            self.resume(checkpoint)
        else:
            self.validate()
            self.save()  # these weights may stay the best
        state, done = self.state, self.share_done()
        for batches in self.batches():
            loss, before = self.step(batches), done
            state.losses.append(_finite(loss, state.step + 1))
            done = self.share_done()
            self.job.on_step(state.step, max(state.step, round(state.step / done)), loss)
            if done >= 1:
                break
            validates = _completes(self.affordable_validations(), before, done)
            if validates:
                self.validate()
            if validates or _completes(3, before, done):
                self.save()
        # Nothing is saved at the end, which is the result.
        self.validate()
        best = best_step(state.validations)
        if best != state.step and self.job.shards_on is None:
            self.load_weights([], self.folder(best))
        elif best != state.step:
            load_shards(self.folder(best), self.model)
        return state.losses

    def batches(self) -> Iterator[list[Batch]]:
        """The micro-batches of each step from here on, epoch after epoch; fewer in the last step of an epoch."""
        first, skipped = divmod(self.state.step, math.ceil(len(self.loader) / self.accumulated))
        for epoch in itertools.count(first):
            self.loader.set_epoch(epoch)
            rest = iter(self.accelerator.skip_first_batches(self.loader, skipped * self.accumulated))
            # A random number is drawn when an epoch begins: of one that was interrupted, before the checkpoint.
            with torch.random.fork_rng(devices=[], enabled=skipped > 0):
                batches = list(itertools.islice(rest, self.accumulated))
            while batches:
                yield batches
                batches = list(itertools.islice(rest, self.accumulated))
            skipped = 0

    def step(self, batches: Sequence[Batch]) -> float:
        """Update the weights. Returns the mean loss of a trained token of the batches of all processes."""
        self.wrapped.train()
        tokens = torch.tensor(sum(map(trained_tokens, batches)), device=self.model.device)
        # The gradients of several processes are averaged.
        weight = self.accelerator.num_processes / int(self.accelerator.reduce(tokens))
        losses = []
        for batch in batches:
            with nullcontext() if batch is batches[-1] else self.accelerator.no_sync(self.wrapped):
                batch_here = {name: value.to(self.model.device) for name, value in batch.items()}
                with self.precision():
                    loss = self.loss(self.wrapped, batch_here) * (trained_tokens(batch_here) * weight)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(self.accelerator.reduce(sum(losses), "mean"))

    def learning_rate(self) -> float:
        """Of the next step. Linear: up to the peak in 100 steps or a tenth of the training, then down to zero at its
        end."""
        number, done = self.state.step + 1, self.share_done()
        of_first_tenth = 10 * done if self.minutes is not None else number / math.ceil(self.steps / 10)
        return self.peak * min(1.0, max(of_first_tenth, number / 100)) * max(0.0, 1 - done)

    def share_done(self) -> float:
        """The share of the training that is done, in steps or, with ``minutes``, in time; at least 1 at its end."""
        of_steps = self.state.step / self.steps
        if self.minutes is None:
            return of_steps
        # Clocks of processes differ. The last validation is part of the time.
        (seconds,) = broadcast_object_list([time.monotonic() - self.began])
        of_time: float = (seconds + self.state.validation_seconds) / (60 * self.minutes)
        return max(of_steps, of_time)

    def affordable_validations(self) -> int:
        """At most ten, which take at most a tenth of the work of the training, or of its time."""
        if self.minutes is None:
            # Of a step, every example is computed forwards and backwards: three times the work.
            affordable = 0.1 * 3 * self.trained / len(self.job.validation)
        else:
            affordable = 0.1 * 60 * self.minutes / self.state.validation_seconds
        return max(1, min(10, int(affordable)))

    @torch.no_grad()
    def validate(self) -> None:
        """Measure the mean loss of a trained token of the validation rows, with the weights as they would be saved, and
        the standard error of its difference from the start."""
        began, state = time.monotonic(), self.state
        rows = [self.collate([row]) for row in self.job.validation]
        counts = [trained_tokens(row) for row in rows]
        processes = self.accelerator.num_processes
        # All call the model equally often, see `step`.
        mine = range(self.accelerator.process_index, math.ceil(len(rows) / processes) * processes, processes)
        self.model.eval()
        losses = []
        with as_saved(self.model, self.widened), self.precision():
            for n in mine:
                mean = self.loss(self.model, rows[n % len(rows)].to(self.model.device))
                losses.append((n, counts[n % len(rows)] * float(mean)))
        sums = [loss for _, loss in sorted(gather_object(losses))][: len(rows)]
        state.start = state.start or sums
        loss = _finite(sum(sums) / sum(counts), state.step)
        error = _standard_error([now - then for now, then in zip(sums, state.start, strict=True)], counts)
        state.validations.append({"step": state.step, "loss": loss, "error": error})
        # All processes must decide alike when to validate again.
        (state.validation_seconds,) = broadcast_object_list([time.monotonic() - began])
        self.job.on_validation(state.step, loss, error)

    def save(self) -> None:
        """Write a checkpoint, and delete all others but that of the best weights."""
        folder, best = self.folder(self.state.step), self.folder(best_step(self.state.validations))
        self.accelerator.save_state(folder)
        if self.job.shards_on is not None:
            save_shards(folder, self.model, self.optimizer)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.state.seconds = time.monotonic() - self.began
            write_text(folder / "state.json", json.dumps(asdict(self.state)))
            for other in set(self.job.work_dir.glob("checkpoint-*")) - {folder, best}:
                shutil.rmtree(other)

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint, and repeat its validations to the job."""
        self.accelerator.load_state(checkpoint)
        self.state = _State(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
        if self.job.shards_on is not None:
            load_shards(checkpoint, self.model, self.optimizer if self.state.step else None)
        self.began = time.monotonic() - self.state.seconds
        for validation in self.state.validations:
            self.job.on_validation(*validation.values())

    def folder(self, step: int) -> Path:
        return self.job.work_dir / f"checkpoint-{step}"

    def select_weights(self, _: Any, weights: list[Any], __: Any) -> None:
        """Have accelerate save the trained parameters, by name, instead of the whole model."""
        weights[:] = [{n: p.detach().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}]

    @torch.no_grad()
    def load_weights(self, models: list[Any], folder: str | Path) -> None:
        """Read the trained parameters, instead of the whole model, which accelerate would read."""
        models.clear()
        for name, tensor in load_file(Path(folder) / "model.safetensors").items():
            self.model.get_parameter(name).copy_(tensor)


def _accelerator(device: torch.device, seed: int) -> Accelerator:
    # A process alone trains on the device of the model, whichever accelerate took for an earlier training.
    launched = "RANK" in os.environ
    return Accelerator(
        cpu=launched and device.type == "cpu",
        device_placement=launched,
        mixed_precision="no",
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
        # Processes call the model different numbers of times in a step.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)],
    )


def latest_checkpoint(work_dir: Path) -> Path | None:
    """The newest checkpoint that is complete, or None."""
    complete = [file.parent for file in work_dir.glob("checkpoint-*/state.json")]
    return max(complete, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), default=None)


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        hint = "lower the learning rate" if step else "the weights of the model are damaged"
        raise ModelError(f"the loss became {loss} at step {step}; {hint}")
    return loss


def _completes(parts: int, before: float, done: float) -> bool:
    """Whether one of equal ``parts`` of the training ended between two shares of it."""
    return int(done * parts + 1e-9) > int(before * parts + 1e-9)


def _standard_error(changes: Sequence[float], counts: Sequence[int]) -> float:
    """Of the mean change of a token's loss; ``changes``: of the sums over rows of ``counts`` tokens."""
    tokens, rows, mean = sum(counts), len(counts), sum(changes) / sum(counts)
    squares = sum((change - mean * count) ** 2 for change, count in zip(changes, counts, strict=True))
    return math.sqrt(squares * rows / max(rows - 1, 1)) / tokens


def filled_in(settings: RecoverSettings, rows: int, processes: int) -> RecoverSettings:
    """``settings`` with a batch size for a training on ``rows`` rows, where the user gave none.

    Batches are halved from 64 down to 2 while there are fewer than 200 steps, and are the smallest with ``minutes``:
    many small steps restore more than a few large ones. Raises `SettingsError` for batches that the processes of a run
    cannot share.
    """
    size = settings.batch_size
    if size is None:
        sizes = [size for size in (64, 32, 16, 8, 4, 2) if size % processes == 0] or [processes]
        enough = (size for size in sizes if settings.max_steps or settings.epochs * math.ceil(rows / size) > 199)
        size = sizes[-1] if settings.minutes is not None else next(enough, sizes[-1])
    if size % processes:
        raise SettingsError(f"--batch-size {size} cannot be shared by {processes} processes; give a multiple")
    return settings.model_copy(update={"batch_size": size})


def with_rate(settings: RecoverSettings, model: Any, adapters: bool) -> RecoverSettings:
    """``settings`` with a peak learning rate, where the user gave none: the paper's 1e-4 for LoRA adapters (LLM-Pruner,
    section 4.1); for weights, in batches of 2 rows, 1/5000 of the root mean square of a matrix, the median of them.

    AdamW moves a weight by about the learning rate whatever its gradient, so that smaller weights need a lower one:
    they are 0.19 in SmolLM2-135M and 0.016 in Qwen2.5-Coder-0.5B, which 1e-4 ruins. With the size of a batch it rises
    by the square root, as the noise of a gradient falls (Malladi et al., 2022, "On the SDEs and Scaling Rules for
    Adaptive Gradient Algorithms").
    """
    if settings.learning_rate is not None:
        return settings
    assert settings.batch_size is not None, "filled in"
    rate = 1e-4
    if not adapters:
        matrices = [parameter.detach() for parameter in model.parameters() if parameter.ndim > 1]
        sizes = [float(torch.linalg.vector_norm(m, dtype=torch.float32)) / math.sqrt(m.numel()) for m in matrices]
        rate = float(f"{statistics.median(sizes) / 5000 * math.sqrt(settings.batch_size / 2):.1e}")
    return settings.model_copy(update={"learning_rate": rate})


def planned_steps(settings: RecoverSettings, rows: int) -> float:
    """Number of optimizer steps at most; the last batch of an epoch may be smaller than the others."""
    if settings.max_steps is not None:
        return settings.max_steps
    if settings.minutes is not None:
        return math.inf
    assert settings.batch_size is not None, "filled in"
    return math.ceil(settings.epochs * math.ceil(rows / settings.batch_size))
