"""Recovering a loaded model: its job and folder, the training by a strategy, and what is recorded of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..engine.ranks import Ranks
from ..errors import MissingExtraError, OutputError, PluginError, SettingsError
from ..files import write_text, writing
from ..models.tokenizer import check_ids
from ..settings import RecoverSettings
from .base import RecoveryJob, RecoveryStrategy, TrainingResult, Validation
from .data import TrainingData, check_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..plugins.catalog import Catalog
    from ..structure.coupling import CouplingGraph

_IDENTITY = "job.json"


@dataclass(frozen=True)
class RecoverJob:
    """``strategies``: the first of them that can train the model is used; there are two where the user names none."""

    settings: RecoverSettings
    strategies: tuple[RecoveryStrategy, ...]


def recover_job(settings: RecoverSettings, catalog: Catalog) -> RecoverJob:
    """Raises `SettingsError` (or `UnknownNameError`) for settings that are wrong."""
    own = settings.settings
    names = [settings.strategy] if settings.strategy else [name for name in ("distil", "lora") if name in own]
    names = names or ["distil", "lora"]
    for name in own:
        if name not in names:
            raise SettingsError(f"--set {name}.…: '{name}' is not chosen here (chosen: {', '.join(names)})")
    return RecoverJob(settings, tuple(catalog.strategies.create(name, own.get(name, {})) for name in names))


def check_recover(job: RecoverJob) -> None:
    """Raise `DataError` for training data that is missing or malformed, and `MissingExtraError` without peft where it
    is needed."""
    if job.strategies[0].adapters and find_spec("peft") is None:
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
    load_teacher: Callable[[], PreTrainedModel] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    on_validation: Callable[[Validation], None] | None = None,
) -> TrainingResult:
    """Train ``model``, in place, with ``strategy``; ``details`` of the result is the record for ``llmpruner.json``.

    ``load_teacher``, ``on_step``, ``on_validation``: see `RecoveryJob`. Where ``work_dir`` has the state of the same
    job, the training goes on from it; delete it once the result is saved. In several processes, all call this with the
    same arguments, and each has the result.

    Raises `OutputError` where ``work_dir`` has the state of another job, `DataError` for tokens that the model does not
    have, and `ModelError` when the training diverges.
    """
    check_ids(torch.tensor([max(max(row["input_ids"]) for row in data.rows)]), model)
    from .training import filled_in  # the Trainer brings datasets, pandas and pyarrow

    settings = filled_in(settings, len(data.rows), adapters=strategy.adapters)
    identity = {
        "strategy": strategy.name,
        "strategy settings": strategy.record(),
        "settings": _shared(settings),
        "examples": data.fingerprint,
        "processes": Ranks.current().count,
        "model": _fingerprint(model),
    }
    Ranks.current().from_first(lambda: _claim(work_dir, identity))
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    validations: list[Validation] = []

    def validated(done: Validation) -> None:
        validations.append(done)
        if on_validation is not None:
            on_validation(done)

    job = RecoveryJob(
        model, tokenizer, data.rows, data.validation, graph, settings, work_dir, load_teacher, on_step, validated
    )  # fmt: skip
    with writing(work_dir):
        result = strategy.train(job)
    if not isinstance(result, TrainingResult):
        raise PluginError(f"recovery strategy '{strategy.name}' returned {type(result).__name__}, not a TrainingResult")
    result.model.eval()
    if not hasattr(result.model, "peft_config"):
        for name, parameter in result.model.named_parameters():
            parameter.requires_grad_(requires_grad.get(name, True))
    record = {
        "strategy": strategy.name,
        "strategy_settings": strategy.record(),
        "settings": _shared(settings),
        "data": data.source,
        "fingerprint": data.fingerprint,
        "examples": len(data.rows),
        "trainable_parameters": result.trainable_parameters,
        "losses": list(result.losses),
        "held_out": data.held_out,
        "validation_examples": len(data.validation),
        "validation": [asdict(done) for done in validations],
        "best_step": min(validations, key=lambda done: done.loss).step if validations else None,
        **result.details,
    }
    return replace(result, notes=(*result.notes, *data.notes), details=record)


def _shared(settings: RecoverSettings) -> dict[str, Any]:
    """The settings that all strategies share, as JSON values."""
    return settings.model_dump(mode="json", exclude={"data", "strategy", "limit", "settings"})


def _claim(work_dir: Path, identity: Mapping[str, Any]) -> None:
    """Create ``work_dir`` for this job. Raises `OutputError` where it belongs to another."""
    file = work_dir / _IDENTITY
    if not file.is_file():
        with writing(work_dir):
            work_dir.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(identity, indent=2) + "\n")
        return
    try:
        kept = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise OutputError(f"{file} is damaged; start anew with --restart") from None
    changed = [key for key, value in identity.items() if kept.get(key) != value]
    if changed:
        raise OutputError(
            f"{work_dir} holds the state of another recovery ({', '.join(changed)} differ); start anew with --restart, "
            "or choose another output"
        )


def _fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over name, shape, dtype and about 64 evenly spaced weights of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu().tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {sample}\n".encode())
    return digest.hexdigest()
