"""The training loop of strategies: transformers' Trainer, without output, seeded and resumable."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..errors import ModelError
from ..models.quiet import quiet_transformers
from ..settings import RecoverSettings
from .base import RecoveryJob
from .examples import IGNORED

Batch = Mapping[str, torch.Tensor]
Loss = Callable[[Any, Batch], torch.Tensor]


def fit(model: Any, job: RecoveryJob, loss: Loss | None = None) -> tuple[float, ...]:
    """Train the parameters of ``model`` that require gradients, in place, and return the loss of every optimizer step.

    ``loss(model, batch)`` returns a scalar with gradients: the mean over the *trained tokens* of a micro batch. Micro
    batches are weighted by their numbers of trained tokens, so that the loss of a step and its gradients are the mean
    over all trained tokens of the step, independent of ``micro_batch_size``. ``batch`` contains tensors of shape
    (examples, tokens), dtype int64, on the model's device: ``input_ids``, ``attention_mask`` (0 on padding) and
    ``labels`` (−100 on padding and for tokens that are not trained on). The logits at position t predict the token at
    t + 1, so the trained tokens are ``labels[:, 1:] != -100``, at ``logits[:, :-1]``. By default it is the model's own
    loss: the cross entropy of the next token, in nats.

    Continues from the newest complete checkpoint in ``job.work_dir``, with the optimizer, schedule, order of the data
    and random state restored, so that the result is the same as without the interruption. Raises `ModelError` when the
    loss is not finite.
    """
    config = model.config
    use_cache = getattr(config, "use_cache", None)
    with quiet_transformers():
        trainer = _Trainer(
            model=model,
            args=_arguments(job),
            train_dataset=job.examples,
            data_collator=collator_for(job.tokenizer),
            callbacks=[_Watch(job)],
        )
        if loss is not None:
            trainer.use_loss(loss)
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=latest_checkpoint(job.work_dir))
        finally:
            if use_cache is not None:
                config.use_cache = use_cache
            model.eval()
    return tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def collator_for(tokenizer: Any) -> DataCollatorForSeq2Seq:
    """Pads a batch to its longest example, on the tokenizer's padding side. Without a padding token, another token is
    used, as padding is masked."""
    if tokenizer.pad_token is None:
        # A copy, as the tokenizer is saved with the model.
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


def latest_checkpoint(work_dir: Path) -> str | None:
    """Path of the newest complete checkpoint; None when there is none. A checkpoint is complete when
    ``trainer_state.json``, which is written last, can be read."""
    complete = []
    for folder in work_dir.glob("checkpoint-*"):
        state = folder / "trainer_state.json"
        if state.is_file():
            try:
                complete.append((int(json.loads(state.read_text())["global_step"]), str(folder)))
            except ValueError:
                continue
    return max(complete)[1] if complete else None


def steps(settings: RecoverSettings, examples: int) -> int:
    """Number of optimizer steps; the last batch of an epoch may be smaller than the others."""
    if settings.max_steps is not None:
        return settings.max_steps
    return math.ceil(settings.epochs * math.ceil(examples / settings.batch_size))


def micro_batch(settings: RecoverSettings) -> int:
    """The largest number of examples within ``micro_batch_size`` that divides ``batch_size``."""
    sizes = range(1, min(settings.micro_batch_size, settings.batch_size) + 1)
    return max(size for size in sizes if settings.batch_size % size == 0)


def _arguments(job: RecoveryJob) -> TrainingArguments:
    settings = job.settings
    total = steps(settings, len(job.examples))
    micro = micro_batch(settings)
    on_cpu = job.model.device.type == "cpu"
    return TrainingArguments(
        output_dir=str(job.work_dir),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // micro,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        max_steps=-1 if settings.max_steps is None else settings.max_steps,
        warmup_steps=min(settings.warmup_steps, total // 10),
        bf16=settings.autocast,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        optim="adamw_torch",
        logging_steps=1,
        # The filter would replace NaN by the mean of earlier losses.
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=max(1, min(50, total // 10)),
        save_total_limit=2,
        seed=settings.seed,
        data_seed=settings.seed,
        label_names=["labels"],
        remove_unused_columns=False,
        report_to=[],
        log_level="error",
        disable_tqdm=True,
    )


class _Trainer(Trainer):  # type: ignore[misc]
    """A Trainer with a custom loss, and with checkpoints of tensors alone, as the configuration of an unevenly pruned
    model cannot be saved."""

    loss: Loss | None = None

    def use_loss(self, loss: Loss) -> None:
        self.loss = loss
        # `compute_loss` already divides by the trained tokens of the whole step.
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: Any) -> tuple[Any, Any]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, count if self.loss is None else sum(_trained_tokens(batch) for batch in batches)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self.loss(model, inputs) * (_trained_tokens(inputs) / num_items_in_batch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        del _internal_call
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
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


def _trained_tokens(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Reports the loss of every step, and stops when it is not finite."""

    def __init__(self, job: RecoveryJob) -> None:
        self.job = job

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        del args, control
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise ModelError(
                f"the loss became {loss} at step {state.global_step}; lower the learning rate, or use float32 weights"
            )
        if self.job.on_step is not None:
            self.job.on_step(state.global_step, state.max_steps, loss)
