"""A training of a loaded model by a strategy: what is refused before it, its folder, and what is recorded of it.
Imports no torch."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError, OutputError, PluginError, SettingsError
from ..files import write_text, writing
from ..settings import RecoverSettings
from .base import RecoveryJob, RecoveryStrategy, TrainingResult, helped
from .data import TrainingData, check_data
from .dense_text import DenseText, dense_text_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..plugins.catalog import Catalog
    from ..structure.coupling import CouplingGraph


JOB_FILE = "job.json"
"""Identifies the recovery of which a folder has the state."""


@dataclass(frozen=True)
class RecoverJob:
    """The settings of a recovery, and what they name. ``dense_text``: of the data, what the dense model writes."""

    settings: RecoverSettings
    strategy: RecoveryStrategy
    dense_text: DenseText | None

    @property
    def reads_dense(self) -> bool:
        """Whether the dense model writes examples, or teaches."""
        return self.strategy.needs_dense or self.dense_text is not None


def recover_job(settings: RecoverSettings, catalog: Catalog) -> RecoverJob:
    """Raises `SettingsError` (or `UnknownNameError`, or `DataError`) for settings that are wrong."""
    strategy = catalog.strategies.create_only(settings.strategy, settings.settings)
    return RecoverJob(settings, strategy, dense_text_in(settings.data))


def check_recover(job: RecoverJob) -> None:
    """Refuse what needs no model to be seen: missing data or libraries, and FSDP."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise SettingsError("recover keeps the whole model in every process; launch it without FSDP")
    if job.strategy.adapters and find_spec("peft") is None:
        raise MissingExtraError("peft", "recover")
    check_data(job.settings.data)


def train(
    model: PreTrainedModel,
    tokenizer: Any,
    graph: CouplingGraph,
    data: TrainingData,
    strategy: RecoveryStrategy,
    settings: RecoverSettings,
    work_dir: Path,
    *,
    load_teacher: Callable[[], PreTrainedModel],
    on_step: Callable[[int, int, float], None] | None = None,
    on_validation: Callable[[int, float, float], None] | None = None,
) -> TrainingResult:
    """Train ``model``, in place, with ``strategy``; ``details`` of the result is the record for ``llmpruner.json``.

    Where ``work_dir`` has the state of the same job, the training goes on from it; delete it once the result is saved.
    In several processes, all call this with the same arguments, and each has the result. Raises `OutputError` where
    ``work_dir`` has the state of another job, and `ModelError` when the training diverges.
    """
    import torch

    from ..engine.ranks import Ranks
    from ..models.tokenizer import check_ids

    check_ids(torch.tensor([max(max(row["input_ids"]) for row in (*data.rows, *data.validation))]), model)
    from .training import filled_in  # the Trainer brings datasets, pandas and pyarrow

    settings = filled_in(settings, len(data.rows), adapters=strategy.adapters)
    about = {
        "strategy": strategy.name,
        "strategy_settings": strategy.record(),
        "settings": settings.model_dump(mode="json", exclude={"data", "strategy", "limit", "settings"}),
        "fingerprint": data.fingerprint,
    }
    processes = Ranks.current()
    processes.from_first(lambda: _claim(work_dir, {**about, "processes": processes.count, "model": _sampled(model)}))
    validations: list[dict[str, Any]] = []

    @functools.cache
    def teacher() -> PreTrainedModel:
        return load_teacher().to(model.device).eval().requires_grad_(False)

    def validated(step: int, loss: float, error: float) -> None:
        validations.append({"step": step, "loss": loss, "error": error})
        if on_validation is not None:
            on_validation(step, loss, error)

    job = RecoveryJob(
        model, tokenizer, data.rows, data.validation, graph, settings, work_dir, teacher, on_step, validated
    )  # fmt: skip
    with writing(work_dir):
        result = strategy.train(job)
    if not isinstance(result, TrainingResult):
        raise PluginError(f"recovery strategy '{strategy.name}' returned {type(result).__name__}, not a TrainingResult")
    result.model.eval().requires_grad_(True)
    record = {
        **about,
        "data": settings.data,
        "examples": len(data.rows),
        "trainable_parameters": result.trainable_parameters,
        "losses": list(result.losses),
        "held_out": data.held_out,
        "validation_examples": len(data.validation),
        "validation": validations,
        "best_step": _best_step(validations),
        "improved": _best_step(validations) != 0 if validations else None,
        **result.details,
    }
    return replace(result, details=record)


def _best_step(validations: Sequence[Mapping[str, Any]]) -> int | None:
    """The step with the lowest loss that `helped`; without any, the first."""
    better = [each for each in validations if helped(validations[0]["loss"], each["loss"], each["error"])]
    return min(better or validations[:1], key=lambda each: each["loss"])["step"] if validations else None


def _claim(work_dir: Path, identity: dict[str, Any]) -> None:
    """Create ``work_dir`` for this job. Raises `OutputError` where it belongs to another."""
    file = work_dir / JOB_FILE
    if not file.is_file():
        with writing(work_dir):
            work_dir.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(identity, indent=2) + "\n")
        return
    kept = json.loads(file.read_text(encoding="utf-8"))
    changed = [key for key, value in identity.items() if kept.get(key) != value]
    if changed and not any(work_dir.glob("checkpoint-*")):
        write_text(file, json.dumps(identity, indent=2) + "\n")
    elif changed:
        raise OutputError(
            f"{work_dir} holds the state of another recovery ({', '.join(changed)} differ); start anew with --restart, "
            "or choose another output"
        )


def _sampled(model: PreTrainedModel) -> str:
    """SHA-256 over name, shape, dtype and about 64 evenly spaced weights of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu().tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {sample}\n".encode())
    return digest.hexdigest()
