"""transformers' Trainer for a pruned model: with a loss of one's own, validation, and the number of every row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..calibration.chat import IGNORED
from ..engine.ranks import Ranks
from ..models.numbers import autocast_to
from ..models.tokenizer import with_padding
from .base import RecoveryJob, Validation
from .schedule import SCHEDULES, micro_batch, saving_steps, warmup_steps, worth_saving

Batch = Mapping[str, torch.Tensor]
Loss = Callable[[Any, Batch], torch.Tensor]

ROW = "row"
"""The key of the numbers of a batch's examples, of shape (examples,): in ``job.examples``, and after them in
``job.validation``."""


def collator_for(tokenizer: Any, model: Any) -> DataCollatorForSeq2Seq:
    """Pads a batch to its longest example, on the tokenizer's padding side, with a token that ``model`` can read."""
    return DataCollatorForSeq2Seq(with_padding(tokenizer, model), label_pad_token_id=IGNORED)


def arguments(job: RecoveryJob, folder: Path, total: int, *, accumulate: int | None = None) -> TrainingArguments:
    """For ``total`` steps, with states of the training in ``folder``. ``accumulate``: for a trial without a warm-up:
    micro-batches per step and process, instead of as many as make a batch.

    Raises `SettingsError` for a warm-up that is as long as the training.
    """
    settings, processes = job.settings, Ranks.current().count
    micro = micro_batch(settings, processes)
    warmup = warmup_steps(settings, total) if accumulate is None else 0
    on_cpu = job.model.device.type == "cpu"
    by_epochs = accumulate is None and settings.max_steps is None and settings.minutes is None
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate or settings.batch_size // (micro * processes),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=warmup,
        weight_decay=settings.weight_decay,
        num_train_epochs=settings.epochs,
        max_steps=-1 if by_epochs else total,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        optim="adamw_torch_fused",
        logging_steps=1,
        # The filter would replace NaN by the mean of earlier losses.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=saving_steps(total),
        save_total_limit=2,
        seed=settings.seed,
        data_seed=settings.seed,
        label_names=["labels"],
        remove_unused_columns=False,
        report_to=[],
        log_level="error",
        disable_tqdm=True,
    )


def computing(job: RecoveryJob) -> AbstractContextManager[Any]:
    """A block in which models compute in bfloat16 with the setting ``autocast``, else in their own dtype."""
    return autocast_to(job.model.device.type, torch.bfloat16, enabled=job.settings.autocast)


def validations(history: Sequence[Mapping[str, Any]]) -> list[Validation]:
    """Those in the log of a Trainer."""
    return [
        Validation(int(entry["step"]), entry["eval_loss"], entry.get("eval_perplexity"))
        for entry in history
        if "eval_loss" in entry
    ]


class LossTrainer(Trainer):  # type: ignore[misc]
    """A Trainer for `fit`: with its loss, validation on ``job.validation``, and checkpoints of tensors alone, as the
    configuration of an unevenly pruned model cannot be saved."""

    control: Any

    def __init__(
        self, model: Any, job: RecoveryJob, loss: Loss | None, args: TrainingArguments, callbacks: Sequence[Any]
    ) -> None:
        self.job, self.loss, self.ranks = job, loss, Ranks.current()
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Of the current step in this process: the rows of every micro-batch, and its part of the loss."""
        self.tokens = 0
        """Of the current step in this process, with padding."""
        self.saving_seconds = 0.0
        """Of the last checkpoint."""
        self._saved = time.monotonic()
        rows = [{**row, ROW: number} for number, row in enumerate([*job.examples, *job.validation])]
        self._held_out = rows[len(job.examples) :]
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows[: len(job.examples)],
            data_collator=collator_for(job.tokenizer, job.model),
            callbacks=list(callbacks),
        )
        if loss is not None:
            # `compute_loss` already divides by the trained tokens of the whole step.
            self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)

    @property
    def sharded(self) -> bool:
        """Whether the parameters are spread over the processes (FSDP)."""
        return bool(self.is_fsdp_enabled)

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: Any) -> tuple[Any, Any]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.parts = []
        self.tokens = sum(batch["input_ids"].numel() for batch in batches)
        if self.loss is not None:
            (count,) = self.ranks.totals(sum(_trained_tokens(batch) for batch in batches))
        return batches, count

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        del cache_enabled
        # Not accelerate's, which converts all logits to float32 and does not reach a second model in the loss.
        return computing(self.job)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.parts.append((inputs[ROW], loss))
        return loss

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.loss is None:
            known = {name: tensor for name, tensor in inputs.items() if name != ROW}
            return super().compute_loss(model, known, return_outputs, num_items_in_batch)
        # The gradients of several processes are averaged.
        return self.loss(model, inputs) * (_trained_tokens(inputs) / num_items_in_batch * self.ranks.count)

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measures the loss on the validation examples, as a mean over their trained tokens, and logs it."""
        model = self.model
        model.eval()
        size, count = self.args.per_device_train_batch_size, self.ranks.count
        batches = [self._held_out[first : first + size] for first in range(0, len(self._held_out), size)]
        total = tokens = 0.0
        for first in range(0, len(batches), count):
            number = first + self.ranks.rank
            # With parameters spread over processes, all must take part in every forward pass.
            batch = self._prepare_inputs(self.data_collator(batches[min(number, len(batches) - 1)]))
            loss = self._loss_of(model, batch)
            if number < len(batches):
                total, tokens = total + float(loss) * _trained_tokens(batch), tokens + _trained_tokens(batch)
        total, tokens = self.ranks.totals(total, tokens)
        found = {"eval_loss": total / tokens}
        if self.loss is None:
            found["eval_perplexity"] = math.exp(min(found["eval_loss"], 700.0))
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def _loss_of(self, model: Any, batch: Batch) -> torch.Tensor:
        with self.compute_loss_context_manager():
            if self.loss is not None:
                return self.loss(model, batch)
            loss: torch.Tensor = self.compute_loss(model, batch)
            return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        del _internal_call
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # A sharded model is saved by transformers, beside the optimizer.
        if self.sharded or not self.args.should_save:
            return
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PreTrainedModel):
            safetensors.torch.save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
        else:
            # Without the name, peft does not look up the configuration of the base model on the hub.
            adapters: Any = model
            names = {key: config.base_model_name_or_path for key, config in adapters.peft_config.items()}
            for adapter in adapters.peft_config.values():
                adapter.base_model_name_or_path = None
            try:
                adapters.save_pretrained(str(folder))
            finally:
                for key, name in names.items():
                    adapters.peft_config[key].base_model_name_or_path = name

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # `trainer_state.json`, which says that a checkpoint is complete, is written after the files of all processes.
        self.ranks.wait()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began = time.monotonic()
        super()._save_checkpoint(model, trial)
        self._saved = time.monotonic()
        self.saving_seconds = self._saved - began

    def worth_saving(self) -> bool:
        """Whether it is time for a checkpoint; see `llmpruner.recovery.schedule.worth_saving`."""
        return worth_saving(self.saving_seconds, time.monotonic() - self._saved)


def _trained_tokens(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())
