"""The story of a recovery: open → data → train → save."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration.conversations import Example, read_examples
from ..discovery.opening import Opener, Source, placed_as
from ..engine.execution import Execution
from ..engine.ranks import Ranks
from ..engine.stages import Stages
from ..errors import LlmprunerError, ModelError, OutputError, PluginError, SettingsError, no_tokenizer
from ..files import alone_in, write_text, writing
from ..models.devices import CPU, described, device_of, free_memory, total_memory
from ..models.generation import table_of
from ..models.model import Model, Structure
from ..models.numbers import dtype_of, loaded_bytes
from ..models.opening import load_model, open_streamed, why_not_streamed
from ..models.reference import Reference
from ..models.tokenizer import check_ids
from ..progress import QUIET, Progress
from ..pruning.workspace import saved
from .base import RecoveryJob, TrainingResult, best_step, nothing
from .data import DenseText, RecoverySetup, TrainingData, prepare, read_data, write_examples
from .predictions import Predictions
from .training import filled_in, latest_checkpoint, planned_steps

_JOB_FILE = "job.json"  # identifies the recovery of which a folder has the state


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
    both_fit = _check_memory(setup, opened, dense, opener)
    examples = read_data(settings.data)
    if output is not None:
        opener.say_widened(opened)
    with alone_in(folder, _JOB_FILE, anew=restart) if ranks.first else nullcontext():
        stages, tokenizer = Stages(), opener.tokenizer(opened)
        teacher = _Dense(opened, dense, opener, folder)
        if dense_text is not None:
            with stages.stage("writing examples"):
                examples[dense_text.source] = ranks.from_first(
                    lambda: _written(dense_text, teacher, folder, settings.seed)
                )
        data = prepare(settings, examples, opened.family, tokenizer, table_of(opened.config))
        predictions = None
        if strategy.takes_predictions and not (both_fit and _reads_once(setup, len(data.rows), ranks)):
            with stages.stage("predictions"):
                about = [*teacher.identity, *(plan.kept.get("vocabulary") for plan in opened.plans)]
                predictions = Predictions((*data.rows, *data.validation), settings.seed, folder, about)
                ranks.from_first(lambda: _mark(folder))
                predictions.make(teacher.to_read, ranks, opener.progress)
        if predictions is not None or not strategy.needs_dense:
            teacher.free()
        with stages.stage("loading"):
            loaded = opener.weights(opened)
        with stages.stage("training"), opener.progress.bar("Recovering") as at, loaded.changing("recovery"):
            result, record = train(
                loaded, setup, data, folder, lambda: teacher.loaded().teacher_of(opened, tokenizer), predictions,
                on_step=lambda number, total, loss: at(number / total, f"Recovering, step {number}, loss {loss:.3f}"),
                progress=opener.progress,
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


def _check_memory(setup: RecoverySetup, opened: Structure, dense: Structure | None, opener: Opener) -> bool:
    """Say what a training needs. Returns whether the dense model fits beside it; raises `SettingsError` for more memory
    than the machine has."""
    strategy, load = setup.strategy, opener.load
    needed = loaded_bytes(opened, load)
    # A number that is trained takes 16 bytes: itself, its gradient and two moments of AdamW, in float32.
    needed += strategy.trained_parameters(opened.graph) * (16 - dtype_of(opened, load).itemsize)
    of_dense = loaded_bytes(dense, load) if dense is not None and strategy.needs_dense else 0
    if not strategy.takes_predictions:
        needed, of_dense = needed + of_dense, 0
    device = opener.device_for(opened)
    memory = total_memory(device)
    if needed > memory:
        room = f"{needed / 2**30:.1f} GiB of memory for '{opened.ref}', of {memory / 2**30:.1f}"
        raise SettingsError(f"{strategy.name} needs {room}; --strategy lora and --dtype bfloat16 take less")
    room = f"at least {needed / 2**30:.1f} GiB of memory"
    opener.progress.status(f"on {described(device)}; strategy {strategy.name}: {room}")
    return needed + of_dense <= memory


def _reads_once(setup: RecoverySetup, rows: int, ranks: Ranks) -> bool:
    """Whether a training reads no row twice; one that is limited by time is taken for one."""
    settings = filled_in(setup.settings, rows, ranks.count, adapters=setup.strategy.needs_peft)
    assert settings.batch_size is not None, "filled in"
    return settings.minutes is not None or planned_steps(settings, rows) <= math.ceil(rows / settings.batch_size)


class _Dense:
    """The dense model of ``opened``. ``structure``: None where nothing reads it, or it was not looked for."""

    def __init__(self, opened: Structure, structure: Structure | None, opener: Opener, folder: Path) -> None:
        self.opened, self.structure, self.opener, self.folder = opened, structure, opener, folder
        self._loaded: Model | None = None

    @property
    def identity(self) -> list[str]:
        base = self.opened.plans[0].base
        return [base.model, base.structure, str(dtype_of(self.opened, self.opener.load))]

    def loaded(self) -> Model:
        """In memory, until `free`."""
        if self._loaded is None:
            structure = self.structure or self.opener.dense_structure(self.opened)
            self._loaded = load_model(structure, placed_as(self.opened, self.opener.load))
        return self._loaded

    def free(self) -> None:
        self._loaded = None
        gc.collect()

    def to_read(self) -> tuple[Model, Any]:
        """In memory if it is there or fits, else streamed; with its network in the tokens of the pruned model."""
        assert self.structure is not None
        structure, load = self.structure, placed_as(self.opened, self.opener.load)
        device = device_of(load.device)
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device == CPU else 1
        # With a copy of the weights in bfloat16, which autocast keeps of those in float32, and the logits.
        needed = sharing * (loaded_bytes(structure, load) * 3 // 2 + (1 << 30))
        if self._loaded is not None or needed <= free_memory(device) or why_not_streamed(structure):
            model = self.loaded()
        else:
            self.opener.progress.status(f"{structure.ref} is read layer by layer")
            model = open_streamed(structure, load, self.folder)
        with model.weights.outside():
            return model, model.teacher_of(self.opened, self.opener.tokenizer(self.opened))


def _written(dense_text: DenseText, dense: _Dense, folder: Path, seed: int) -> list[tuple[str, Example]]:
    """The examples that the dense model writes, kept in ``folder`` for an interrupted run."""
    identity = json.dumps([asdict(dense_text), seed, *dense.identity])
    file = folder / f"self-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.jsonl"
    if not file.is_file():
        model = dense.loaded()
        if model.tokenizer is None:
            raise no_tokenizer(f"the dense model '{model.ref}'", "it cannot write examples")
        examples = write_examples(dense_text, model, seed, dense.opener.progress)
        _mark(folder)
        write_text(file, "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in examples))
    return read_examples(str(file))


def _mark(folder: Path) -> None:
    """Until the training identifies itself, so that a run which was killed goes on in ``folder``."""
    if not (folder / _JOB_FILE).is_file():
        write_text(folder / _JOB_FILE, "{}\n")


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
) -> tuple[TrainingResult, dict[str, Any]]:
    """Train a model in place. Returns the strategy's result, and the record of the training for ``llmpruner.json``.

    Where ``work_dir`` has the state of the same training, it goes on from there; delete it once the result is saved.
    In several processes, all call this with the same arguments, and each has the result. Raises `OutputError` where
    ``work_dir`` has the state of another training, and `ModelError` when the training diverges.
    """
    model, strategy = loaded.network, setup.strategy
    check_ids(torch.tensor([max(max(row["input_ids"]) for row in (*data.rows, *data.validation))]), model)
    ranks = Ranks.current()
    settings = filled_in(setup.settings, len(data.rows), ranks.count, adapters=strategy.needs_peft)
    about = {
        "strategy": strategy.name,
        "strategy_settings": strategy.record(),
        "settings": settings.model_dump(mode="json", exclude={"data", "strategy", "limit", "settings"}),
        "fingerprint": hashlib.sha256(json.dumps([data.rows, data.validation]).encode()).hexdigest(),
    }
    ranks.from_first(lambda: _claim(work_dir, {**about, "processes": ranks.count, "model": _sampled(model)}))
    if checkpoint := latest_checkpoint(work_dir):
        progress.status(f"continuing the training from {checkpoint}")
    validations: list[dict[str, Any]] = []

    @functools.cache
    def teacher() -> PreTrainedModel:
        return load_teacher().to(model.device).eval().requires_grad_(False)

    def on_validation(step: int, loss: float, error: float) -> None:
        validations.append({"step": step, "loss": loss, "error": error})
        progress.status(f"step {step}: {'held-out loss' if data.held_out else 'loss on examples'} {loss:.4f}")

    job = RecoveryJob(
        model, loaded.tokenizer, data.rows, data.validation, loaded.graph, settings, work_dir, teacher, predictions,
        on_step, on_validation,
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
        "examples": len(data.rows),
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
    file = work_dir / _JOB_FILE
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    changed = [key for key, value in identity.items() if kept.get(key) != value]
    if changed and any(work_dir.glob("checkpoint-*")):
        raise OutputError(
            f"{work_dir} holds the state of another recovery ({', '.join(changed)} differ); start anew with --restart, "
            "or choose another output"
        )
    work_dir.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(identity, indent=2) + "\n")


def _sampled(model: PreTrainedModel) -> str:
    """SHA-256 over name, shape, dtype and about 64 evenly spaced weights of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu().tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {sample}\n".encode())
    return digest.hexdigest()
