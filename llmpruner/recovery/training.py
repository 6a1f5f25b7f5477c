"""The training loop that the built-in strategies share: transformers' Trainer, quiet, seeded and
resumable."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..data.instructions import collator_for
from ..errors import ModelError
from ..models.quiet import quiet_transformers
from .base import RecoveryJob, RecoverySettings


def fit(model: Any, job: RecoveryJob) -> tuple[float, ...]:
    """Train the parameters of ``model`` that require gradients, in place, and return the loss of every step.

    Continues from the newest complete checkpoint in ``job.work_dir``; the result is then the same as without
    the interruption, because optimizer, schedule, data order and random state are restored. Raises
    `ModelError` when the loss is not finite.
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
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=latest_checkpoint(job.work_dir))
        finally:
            if use_cache is not None:
                config.use_cache = use_cache
            model.eval()
    return tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def latest_checkpoint(work_dir: Path) -> str | None:
    """The newest checkpoint that was written to its end: the trainer's state is the last file of each."""
    complete = []
    for folder in work_dir.glob("checkpoint-*"):
        state = folder / "trainer_state.json"
        if state.is_file():
            try:
                complete.append((int(json.loads(state.read_text())["global_step"]), str(folder)))
            except ValueError:
                continue
    return max(complete)[1] if complete else None


def steps(settings: RecoverySettings, examples: int) -> int:
    """Optimizer steps of a run; the last batch of an epoch may be smaller than the others."""
    if settings.max_steps is not None:
        return settings.max_steps
    return math.ceil(settings.epochs * math.ceil(examples / settings.batch_size))


def micro_batch(settings: RecoverySettings) -> int:
    """The largest micro batch allowed that divides the batch, so that accumulation gives exactly the
    batch."""
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
        # The filter would replace a NaN by the mean of the losses before it.
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
    """A Trainer whose checkpoints hold only tensors: a model pruned unevenly has no config to save."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        del _internal_call
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PreTrainedModel):
            safetensors.torch.save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
        else:
            # The name of the base model makes peft look its config up, on the hub if need be.
            adapters: Any = model
            names = {key: config.base_model_name_or_path for key, config in adapters.peft_config.items()}
            for adapter in adapters.peft_config.values():
                adapter.base_model_name_or_path = None
            try:
                adapters.save_pretrained(str(folder))
            finally:
                for key, name in names.items():
                    adapters.peft_config[key].base_model_name_or_path = name


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Reports every step, and stops a run that has diverged."""

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
