"""The story of a recovery: open → data → train → save."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..discovery.opening import Opener, Source, placed_as
from ..engine.execution import Execution
from ..engine.ranks import Ranks
from ..engine.stages import Stages
from ..errors import LlmprunerError, ModelError, OutputError, PluginError
from ..files import alone_in, read_json, write_text, writing
from ..models.generation import table_of
from ..models.model import Model, Structure
from ..models.reference import Reference
from ..models.tokenizer import check_ids
from ..progress import QUIET, Progress
from ..pruning.workspace import saved
from .base import RecoveryJob, TrainingResult, best_step, nothing
from .data import RecoverySetup, TrainingData, prepare, read_data
from .dense import JOB_FILE, DenseModel
from .forecast import forecast
from .predictions import Predictions
from .training import filled_in, latest_checkpoint, planned_steps, with_rate


def recover(
    source: Source | Reference,
    setup: RecoverySetup,
    output: Path | None,
    work_dir: Path | None,
    opener: Opener,
    *,
    restart: bool,
) -> Model:
    """The trained model, saved to ``output`` unless that is None. The others are those of `llmpruner.recover`."""
    settings, strategy, dense_text = setup.settings, setup.strategy, setup.dense_text
    ranks = Ranks.current()
    folder = work_dir or Path(f"{output}.recovery")
    opened = opener.structure(source)
    opener.check_tokenizer(opened, "it cannot be trained on text")
    if isinstance(opened, Model) and opened.streamed is not None:
        raise ModelError(f"'{opened.ref}' is read layer by layer; pass its folder")
    dense: Structure | None = None
    if setup.reads_dense:
        try:
            dense = opener.dense_structure(opened)
        except LlmprunerError as error:
            raise ModelError(f"{error}; without it, give --data FILE and --strategy lora or full") from error
    begun = ranks.from_first(lambda: {} if restart else _recorded(folder))
    expected = forecast(setup, opened, dense, opener, begun.get("sharded"))
    examples = read_data(settings.data)
    if output is not None:
        opener.say_widened(opened)
    with alone_in(folder, JOB_FILE, anew=restart) if ranks.first else nullcontext():
        stages, teacher = Stages(), DenseModel(opened, dense, opener, folder)
        if dense_text is not None:
            with stages.stage("writing examples"):
                examples[dense_text.source] = ranks.from_first(lambda: teacher.written(dense_text, settings.seed))
        data = prepare(settings, examples, opened.family, opener.tokenizer(opened), table_of(opened.config))
        predictions, beside = None, begun.get("beside", expected.dense_fits and _reads_once(setup, data, ranks))
        if strategy.takes_predictions and not beside:
            with stages.stage("predictions"):
                about = [*teacher.identity, *(plan.kept.get("vocabulary") for plan in opened.plans)]
                predictions = Predictions((*data.rows, *data.validation), settings.seed, folder, about)
                ranks.from_first(teacher.mark)
                predictions.make(teacher.to_read, ranks, opener.progress)
        if predictions is not None or not strategy.needs_dense:
            teacher.free()
        load, shards_on = opener.load, opener.device_for(opened) if expected.shards > 1 else None
        if shards_on is not None and not isinstance(opened, Model):  # layer by layer, it is moved to the device
            load = placed_as(opened, load).model_copy(update={"device": "cpu"})
        with stages.stage("loading"):
            loaded = replace(opener, load=load).weights(opened)
        with stages.stage("training"), opener.progress.bar("Recovering") as at, loaded.changing("recovery"):
            result, record = train(
                loaded, setup, data, folder, teacher.teacher, predictions,
                on_step=lambda number, total, loss: at(number / total, f"Recovering, step {number}, loss {loss:.3f}"),
                progress=opener.progress, shards_on=shards_on, recomputes=expected.recomputes,
            )  # fmt: skip
        before = loaded.record or {}
        history = [*before.get("recovery", []), record]
        recovered = replace(loaded, network=result.model, record={**before, "recovery": history})
        if output is None:
            return loaded.become(recovered)
        execution = Execution(loaded.weights, ranks, progress=opener.progress, stages=stages)
        recovered = saved(recovered, output, execution, "recover", {**settings.given(), **opener.load.given()})
        if ranks.first and work_dir is None:
            shutil.rmtree(folder, ignore_errors=True)
        return loaded.become(recovered)


def _reads_once(setup: RecoverySetup, data: TrainingData, ranks: Ranks) -> bool:
    """Whether a training reads no row twice; one that is limited by time is taken for one."""
    rows = len(data.rows)
    settings = filled_in(setup.settings, rows, ranks.count)
    assert settings.batch_size is not None, "filled in"
    return settings.minutes is not None or planned_steps(settings, rows) <= math.ceil(rows / settings.batch_size)


def train(
    loaded: Model,
    setup: RecoverySetup,
    data: TrainingData,
    work_dir: Path,
    load_teacher: Callable[[], PreTrainedModel],
    predictions: Predictions | None = None,
    *,
    on_step: Callable[[int, int, float], object] = nothing,
    progress: Progress = QUIET,
    shards_on: torch.device | None = None,
    recomputes: bool = False,
) -> tuple[TrainingResult, dict[str, Any]]:
    """Train a model in place. Returns the strategy's result, and the record of the training for ``llmpruner.json``.
    ``predictions``, ``shards_on`` and ``recomputes``: see `RecoveryJob`.

    Where ``work_dir`` has the state of the same training, it goes on from there; delete it once the result is saved.
    In several processes, all call this with the same arguments, and each has the result. Raises `OutputError` where
    ``work_dir`` has the state of another training, and `ModelError` when the training diverges.
    """
    model, strategy = loaded.network, setup.strategy
    check_ids(torch.tensor([max(max(row["input_ids"]) for row in (*data.rows, *data.validation))]), model)
    ranks = Ranks.current()
    settings = filled_in(setup.settings, len(data.rows), ranks.count)
    settings = ranks.from_first(lambda: with_rate(settings, model, strategy.needs_peft))
    progress.status(f"peak learning rate {settings.learning_rate:.1e}")
    about = {
        "strategy": strategy.name,
        "strategy_settings": strategy.record(),
        "settings": settings.model_dump(mode="json", exclude={"data", "strategy", "limit", "settings", "sharded"}),
        "fingerprint": hashlib.sha256(json.dumps([data.rows, data.validation]).encode()).hexdigest(),
    }
    execution = {"processes": ranks.count, "sharded": shards_on is not None, "beside": predictions is None}
    ranks.from_first(lambda: _claim(work_dir, {**about, **execution, "model": _sampled(model)}))
    if checkpoint := latest_checkpoint(work_dir):
        progress.status(f"continuing the training from {checkpoint}")
    validations: list[dict[str, Any]] = []

    @functools.cache
    def teacher() -> PreTrainedModel:
        return load_teacher().to(shards_on or model.device).eval().requires_grad_(False)

    def on_validation(step: int, loss: float, error: float) -> None:
        validations.append({"step": step, "loss": loss, "error": error})
        progress.status(f"step {step}: {'held-out loss' if data.held_out else 'loss on examples'} {loss:.4f}")

    job = RecoveryJob(
        model, loaded.tokenizer, data.rows, data.validation, loaded.graph, settings, work_dir, teacher, predictions,
        shards_on, recomputes, on_step, on_validation,
    )  # fmt: skip
    with writing(work_dir), ranks.noticing():
        result = strategy.train(job)
    if not isinstance(result, TrainingResult):
        raise PluginError(f"recovery strategy '{strategy.name}' returned {type(result).__name__}, not a TrainingResult")
    result.model.eval().requires_grad_(True)
    best = best_step(validations) if validations else None
    return result, {
        **about,
        "data": settings.data,
        "examples": data.examples,
        "trainable_parameters": result.trainable_parameters,
        "losses": list(result.losses),
        "held_out": data.held_out,
        "validation_examples": len(data.validation),
        "validation": validations,
        "best_step": best,
        "improved": None if best is None else best != 0,
    }


def _claim(work_dir: Path, identity: dict[str, Any]) -> None:
    """Create ``work_dir`` for this job. Raises `OutputError` where it has a checkpoint of another."""
    file, kept = work_dir / JOB_FILE, _recorded(work_dir)
    changed = [key for key, value in identity.items() if kept.get(key) != value]
    if changed and any(work_dir.glob("checkpoint-*")):
        raise OutputError(
            f"{work_dir} holds the state of another recovery ({', '.join(changed)} differ); start anew with --restart, "
            "or choose another output"
        )
    work_dir.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(identity, indent=2) + "\n")


def _recorded(work_dir: Path) -> dict[str, Any]:
    """What `_claim` wrote."""
    file = work_dir / JOB_FILE
    return dict(read_json(file)) if file.is_file() else {}


def _sampled(model: PreTrainedModel) -> str:
    """SHA-256 over name, shape, dtype and about 64 evenly spaced weights of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu().tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {sample}\n".encode())
    return digest.hexdigest()
