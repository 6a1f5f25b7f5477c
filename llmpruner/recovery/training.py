"""`fit`: transformers' Trainer for a pruned model, with validations that decide which weights are the result, and a
learning rate that may follow the time."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..calibration.chat import IGNORED
from ..engine.ranks import Ranks
from ..errors import ModelError, SettingsError
from ..models.messages import quiet_transformers
from ..models.numbers import autocast_to, computes_bfloat16_fast
from ..models.tokenizer import with_padding
from ..settings import RecoverSettings
from .base import RecoveryJob, Row, TrainingResult, helped
from .losses import Batch, Loss, by_length, next_token_loss, trained_tokens

_NEVER = 10**9
"""More steps than a training takes: `_Schedule` says when to validate and to save, and when the time is up."""
_NARROW = {torch.bfloat16, torch.float16}


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
    use_cache = getattr(model.config, "use_cache", None)
    try:
        with quiet_transformers(), _in_float32(model, job) as (autocast, widened):
            trainer = _LossTrainer(model, job, loss or next_token_loss, autocast, widened)
            trainer.train(resume_from_checkpoint=Ranks.current().from_first(lambda: latest_checkpoint(job.work_dir)))
    finally:
        if use_cache is not None:
            model.config.use_cache = use_cache
        model.eval()
    losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return TrainingResult(model, losses, sum(p.numel() for p in model.parameters() if p.requires_grad))


def filled_in(settings: RecoverSettings, rows: int, *, adapters: bool) -> RecoverSettings:
    """``settings`` with a batch size and a learning rate for a training on ``rows`` rows, where the user gave none.

    Batches are halved from 64 down to 2 while there are fewer than 200 steps: many small steps restore more than a few
    large ones. AdamW's first steps move every weight by about the learning rate, whichever way its noisy gradient
    points, so that a few steps of all weights at 1e-4 raise the loss: below 100, the rate is proportionally lower.
    Raises `SettingsError` for batches that the processes of a run cannot share.
    """
    processes, size = Ranks.current().count, settings.batch_size
    if size is None:
        sizes = [size for size in (64, 32, 16, 8, 4, 2) if size % processes == 0] or [processes]
        if settings.minutes is not None:
            enough = (size for size in sizes if size <= settings.micro_batch_size)
        else:
            enough = (size for size in sizes if settings.max_steps or settings.epochs * math.ceil(rows / size) > 199)
        size = next(enough, sizes[-1])
    if size % processes:
        raise SettingsError(f"--batch-size {size} cannot be shared by {processes} processes; give a multiple")
    settings = settings.model_copy(update={"batch_size": size})
    if settings.learning_rate is not None:
        return settings
    # With minutes, the schedule lowers it.
    few = 1.0 if adapters or settings.minutes is not None else planned_steps(settings, rows) / 100
    return settings.model_copy(update={"learning_rate": 1e-4 * min(1.0, few)})


def planned_steps(settings: RecoverSettings, rows: int) -> int:
    """Number of optimizer steps at most; the last batch of an epoch may be smaller than the others."""
    if settings.max_steps is not None:
        return settings.max_steps
    if settings.minutes is not None:
        return _NEVER
    assert settings.batch_size is not None, "filled in"
    return math.ceil(settings.epochs * math.ceil(rows / settings.batch_size))


def latest_checkpoint(work_dir: Path) -> str | None:
    """Path of the newest checkpoint whose ``trainer_state.json``, which is written last, can be read; or None."""
    complete = []
    for file in work_dir.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            complete.append((int(json.loads(file.read_text())["global_step"]), str(file.parent)))
    return max(complete)[1] if complete else None


@contextlib.contextmanager
def _in_float32(model: Any, job: RecoveryJob) -> Iterator[tuple[bool, Mapping[Any, torch.dtype]]]:
    """Keep trained parameters of 16 bits in float32: most steps at a low learning rate are smaller than the distance of
    two bfloat16 numbers, and would be rounded away. A model in float16 is in float32 as a whole, as bfloat16 would be
    less precise. Frozen weights in float16, to which adapters are added, stay so, and compute in bfloat16, as float16
    has no gradients as small as those of a mean over thousands of tokens.

    Yields whether to compute in bfloat16, under autocast, which some operators refuse (DBRX adds bfloat16 to float32);
    and the former dtypes, to which parameters are rounded at the end."""
    narrow = {p.dtype for p in model.parameters() if p.requires_grad} & _NARROW
    frozen = not narrow and (job.model.dtype == torch.float16 or computes_bfloat16_fast(job.model))
    autocast, whole = frozen or narrow == {torch.bfloat16}, torch.float16 in narrow
    widened = {p: p.dtype for p in model.parameters() if p.dtype in _NARROW and (p.requires_grad or whole)}
    try:
        for parameter in widened:
            parameter.data = parameter.data.float()
        yield autocast and _runs_under_autocast(model, job.examples[0]), widened
    finally:
        for parameter, dtype in widened.items():
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)


def _runs_under_autocast(model: Any, row: Row) -> bool:
    ids = torch.tensor([row["input_ids"][:8]], device=model.device)
    try:
        with torch.no_grad(), autocast_to(model.device.type, torch.bfloat16):
            model(input_ids=ids, use_cache=False)
    except RuntimeError:  # another cause raises again in the training
        return False
    return True


def _arguments(job: RecoveryJob) -> TrainingArguments:
    settings, processes = job.settings, Ranks.current().count
    assert settings.batch_size is not None and settings.learning_rate is not None, "filled in"
    part = settings.batch_size // processes
    micro = max(size for size in range(1, min(settings.micro_batch_size, part) + 1) if part % size == 0)
    on_cpu = job.model.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(job.work_dir),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=part // micro,
        learning_rate=settings.learning_rate,
        max_steps=planned_steps(settings, len(job.examples)),
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        optim="adamw_torch_fused",
        logging_steps=1,
        # The filter would replace NaN by the mean of earlier losses.
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=_NEVER,
        save_steps=_NEVER,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_lower",
        greater_is_better=False,
        seed=settings.seed,
        data_seed=settings.seed,
        remove_unused_columns=False,
        # Processes call the model different numbers of times in a step.
        ddp_broadcast_buffers=False,
        log_level="error",
        disable_tqdm=True,
    )
    if processes == 1:
        # By itself, it takes the first GPU, and a batch for each GPU of the machine.
        arguments.__dict__["_setup_devices"] = job.model.device
        arguments._n_gpu = min(arguments.n_gpu, 1)
        if job.model.device.type == "cuda":
            torch.cuda.set_device(job.model.device)
    return arguments


class _LossTrainer(Trainer):  # type: ignore[misc]
    """A Trainer with the loss, the learning rate and the validations of `fit`. Its checkpoints have the trained
    parameters by name: transformers cannot save layers that differ in width."""

    def __init__(self, model: Any, job: RecoveryJob, loss: Loss, autocast: bool, widened: Mapping[Any, Any]) -> None:
        self.job, self.loss, self.autocast, self.widened, self.ranks = job, loss, autocast, widened, Ranks.current()
        # When the training began, had it not been interrupted; and how long the last validation took.
        self.began, self.check_seconds = time.monotonic(), 0.0
        super().__init__(
            model=model,
            args=_arguments(job),
            train_dataset=list(job.examples),
            eval_dataset=list(job.validation),
            data_collator=DataCollatorForSeq2Seq(with_padding(job.tokenizer, job.model), label_pad_token_id=IGNORED),
            callbacks=[_Schedule(self)],
        )
        # `compute_loss` divides by the trained tokens of the whole step.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)

    def share_done(self) -> float:
        """The share of the training that is done, in steps or, with ``minutes``, in time; at least 1 at its end."""
        steps = float(self.state.global_step / max(self.state.max_steps, 1))
        if self.job.settings.minutes is None:
            return steps
        # Clocks of processes differ. The last validation is part of the time.
        seconds = self.ranks.from_first(lambda: time.monotonic() - self.began + self.check_seconds)
        return max(steps, seconds / (60 * self.job.settings.minutes))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Linear: up to the peak in 100 steps or a tenth of the training, then down to zero at its end. Where minutes
        give fewer than 100 steps, the peak is proportionally lower, see `filled_in`."""

        def factor(step: int) -> float:
            if self.job.settings.minutes is None:
                done, begun, peak = step / num_training_steps, (step + 1) / math.ceil(num_training_steps / 10), 1.0
            else:
                done = self.share_done()
                begun, peak = 10 * done, min(1.0, (step + 1) / (100 * done))
            return peak * min(1.0, max(begun, (step + 1) / 100)) * max(0.0, 1 - done)

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: Any) -> tuple[Any, Any]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        (count,) = self.ranks.totals(sum(map(trained_tokens, batches)))
        return batches, count

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        # Not accelerate's, which converts all logits to float32 and does not reach a second model in the loss.
        return autocast_to(self.job.model.device.type, torch.bfloat16, enabled=self.autocast)

    def compute_loss(self, model: Any, inputs: Batch, *_: Any, num_items_in_batch: Any) -> Any:
        total = sum(self.loss(model, part) * trained_tokens(part) for part in by_length(inputs))
        # The gradients of several processes are averaged.
        return total * (self.ranks.count / num_items_in_batch)

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The mean loss of a trained token of the validation rows, with the weights as they would be saved; logged with
        the standard error of its difference from the start. ``eval_lower``: the loss, or infinity if it did not
        help."""
        began = time.monotonic()
        self.model.eval()
        rows = [self.data_collator([row]) for row in self.job.validation]
        sums, counts = [0.0] * len(rows), [trained_tokens(row) for row in rows]
        with _as_saved(self.model, self.widened), self.compute_loss_context_manager():
            for n in range(self.ranks.rank, len(rows), self.ranks.count):
                sums[n] = counts[n] * float(self.loss(self.model, self._prepare_inputs(rows[n])))
        sums, history = list(self.ranks.totals(*sums)), self.state.log_history
        before = history[0]["eval_rows"] if history else sums
        loss, start = sum(sums) / sum(counts), sum(before) / sum(counts)
        error = _standard_error([now - then for now, then in zip(sums, before, strict=True)], counts)
        self.log({"eval_loss": loss, "eval_error": error, **({} if history else {"eval_rows": sums})})
        # All processes must decide alike when to validate again.
        self.check_seconds = self.ranks.from_first(lambda: time.monotonic() - began)
        metrics = {"eval_loss": loss, "eval_lower": loss if helped(start, loss, error) else math.inf}
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log the seconds so far too, for a training that is resumed, and report to the job."""
        super().log({**logs, "seconds": time.monotonic() - self.began}, start_time)
        job, entry = self.job, self.state.log_history[-1]
        step, loss = entry["step"], entry.get("loss", entry.get("eval_loss", 0.0))
        if not math.isfinite(loss):
            hint = "lower the learning rate" if step else "the weights of the model are damaged"
            raise ModelError(f"the loss became {loss} at step {step}; {hint}")
        if "loss" in entry:
            job.on_step(step, max(step, round(step / self.share_done())), entry["loss"])
        if "eval_loss" in entry:
            job.on_validation(step, entry["eval_loss"], entry["eval_error"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            save_file({n: p.detach().cpu().contiguous() for n, p in trained.items()}, folder / "model.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.model.get_parameter(name).copy_(tensor)

    def _load_best_model(self) -> None:
        # No checkpoint is written at the end.
        if self.state.best_global_step != self.state.global_step:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # `trainer_state.json`, which says that a checkpoint is complete, is written after the files of all processes.
        self.ranks.wait()


@contextlib.contextmanager
def _as_saved(model: Any, widened: Mapping[Any, torch.dtype]) -> Iterator[None]:
    """Compute with the weights as they will be saved: rounded to their dtype, and adapters merged into weights of 16
    bits, each while its layer computes, as a second copy of all may not fit into memory."""
    exact = {parameter: parameter.data for parameter in widened}
    unmerged: dict[Any, torch.Tensor] = {}

    def merge(layer: Any, _: Any) -> None:
        weight = layer.get_base_layer().weight
        unmerged[layer] = weight.data
        weight.data = weight.data.clone()
        with torch.autocast(weight.device.type, enabled=False):
            layer.merge()

    def restore(layer: Any, *_: Any) -> None:
        layer.merged_adapters.clear()
        layer.get_base_layer().weight.data = unmerged.pop(layer)

    adapted = [layer for layer in model.modules() if hasattr(layer, "merged_adapters")]
    narrow = [layer for layer in adapted if layer.get_base_layer().weight.dtype in _NARROW]
    hooks = [layer.register_forward_pre_hook(merge) for layer in narrow]
    hooks += [layer.register_forward_hook(restore) for layer in narrow]
    try:
        for parameter, dtype in widened.items():
            parameter.data = parameter.data.to(dtype).float()
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, data in exact.items():
            parameter.data = data


def _standard_error(changes: Sequence[float], counts: Sequence[int]) -> float:
    """Of the mean change of a token's loss; ``changes``: of the sums over rows of ``counts`` tokens."""
    tokens, rows, mean = sum(counts), len(counts), sum(changes) / sum(counts)
    squares = sum((change - mean * count) ** 2 for change, count in zip(changes, counts, strict=True))
    return math.sqrt(squares * rows / max(rows - 1, 1)) / tokens


class _Schedule(TrainerCallback):  # type: ignore[misc]
    """Says when to validate, to save and to stop."""

    def __init__(self, trainer: _LossTrainer) -> None:
        self._trainer = trainer
        self._before = 0.0  # `share_done` at the step before

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self._trainer
        if not state.log_history:
            # These weights may stay the best.
            state.best_metric, state.best_global_step = trainer.evaluate()["eval_loss"], 0
            state.best_model_checkpoint = str(Path(args.output_dir) / "checkpoint-0")
            trainer._save_checkpoint(trainer.model, None)
            return
        # The folder may have been moved, or be named otherwise, since the interruption.
        state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")
        trainer.began = time.monotonic() - state.log_history[-1]["seconds"]
        self._before = trainer.share_done()
        for entry in state.log_history:
            if "eval_loss" in entry:
                trainer.job.on_validation(entry["step"], entry["eval_loss"], entry["eval_error"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, settings, done = self._trainer, self._trainer.job.settings, self._trainer.share_done()
        # Validations take at most a tenth of the work, or time.
        if settings.minutes is None:
            # Of a step, every example is computed forwards and backwards: three times the work.
            affordable = 0.1 * 3 * args.max_steps * settings.batch_size / len(trainer.job.validation)
        else:
            # After an interruption, it is not known yet how long a validation takes.
            affordable = 0.1 * 60 * settings.minutes / (trainer.check_seconds or 1.0)
        ends = done >= 1
        control.should_training_stop = ends
        control.should_evaluate = ends or self._completes(max(1, min(10, int(affordable))), done)
        # Nothing is saved at the end, which is the result.
        control.should_save = not ends and (control.should_evaluate or self._completes(3, done))
        self._before = done

    def _completes(self, parts: int, done: float) -> bool:
        """Whether the step that was done is the last in one of equal ``parts`` of the training."""
        return int(done * parts + 1e-9) > int(self._before * parts + 1e-9)
