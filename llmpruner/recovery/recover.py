"""The story of a recovery: open → data → strategy → train → save."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..calibration.chat import format_note
from ..calibration.conversations import Completion, Example, Instruction
from ..discovery.dense import dense_structure, open_dense, placed_as
from ..discovery.opening import Opener, Source, check_source
from ..engine.ranks import Ranks
from ..engine.stages import Stages, write_run
from ..errors import LlmprunerError, ModelError, SettingsError, no_tokenizer
from ..files import alone_in, check_new_directory, check_space, write_text
from ..models.model import Model, Structure
from ..models.numbers import check_device, dtype_of, loaded_bytes
from ..models.opening import reopened
from ..models.positions import table_of_config
from ..models.record import read_any_record
from ..pruning.saving import save
from ..report.history import loss_curve
from .base import RecoveryStrategy, TrainingResult
from .data import TrainingData, prepare
from .dense_text import DenseText, dense_text_in, write_examples
from .job import RecoverJob, check_recover, train
from .memory import device_bytes, training_bytes

_WIDE = 4
"""Bytes of a trained weight, and of each of its two moments."""


def recover(
    source: Source, job: RecoverJob, output: Path | None, work_dir: Path | None, opener: Opener, *, restart: bool
) -> Model:
    """The trained model. ``output``: where to save it; None: nowhere. ``work_dir``: of the state of the training; by
    default ``OUTPUT.recovery``. Raises as `llmpruner.recover`."""
    check_source(source)
    folder, settings = _folder(output, work_dir), job.settings
    check_device(opener.load.device)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise SettingsError("recover keeps the whole model in every process; launch it without FSDP")
    # Processes connect only now.
    ranks = Ranks.current()
    opener = opener.of_ranks(ranks)
    if output is not None:
        ranks.from_first(lambda: check_new_directory(output))
    check_recover(job)
    own = dense_text_in(settings.data)

    opened = opener.readable(source, "be trained on text")
    if isinstance(opened, Model) and opened.streamed is not None:
        raise ModelError(f"'{opened.ref}' is read layer by layer; pass its folder")
    tokenizer, positions = opener.tokenizer(opened), table_of_config(opened.config)
    data = None if own else prepare(settings, opened.family, tokenizer, positions=positions)
    strategy = _strategy(job, opened, opener, own)
    if isinstance(source, Model) and not getattr(strategy.settings, "merge", True):
        _check_files(source)
    if output is not None:
        _check_disk(strategy, opened, output, opener)
        opener.say_widened(opened)
    with ExitStack() as stack:
        if ranks.first:
            stack.enter_context(alone_in(folder, anew=restart))
        stages = Stages()
        with stages.stage("loading"):
            loaded = opener.weights(opened)
        dense = functools.cache(lambda: open_dense(loaded, opener.catalog, _placed(loaded, opener)))
        if data is None:
            assert own is not None
            with stages.stage("writing examples"):
                written = ranks.from_first(lambda: _written(own, loaded, dense, folder, settings.seed, opener))
            data = prepare(settings, opened.family, tokenizer, positions=positions, written={own.source: written})
            if not strategy.needs_dense:
                dense.cache_clear()
        with stages.stage("training"):
            result = _trained(job, strategy, loaded, data, folder, lambda: dense().model, opener)
        history = [*(loaded.record or {}).get("recovery", []), result.details]
        recovered = replace(loaded, model=result.model, record={**(loaded.record or {}), "recovery": history})
        if output is None:
            return loaded.become(recovered)
        with stages.stage("saving"):
            form = ranks.from_first(lambda: _save(recovered, output, folder))
        if ranks.first:
            write_run(output, stages, "recover", opened.ref, settings.given())
        loaded.become(reopened(replace(recovered, form=form), output, trust_remote_code=opener.load.trust_remote_code))
        if work_dir is None and ranks.first:
            shutil.rmtree(folder, ignore_errors=True)
        return loaded


def _folder(output: Path | None, work_dir: Path | None) -> Path:
    """Of the state of the training."""
    if work_dir is not None:
        return work_dir
    if output is None:
        raise SettingsError("recovery needs a directory for its state: give output, or work_dir")
    if not output.name:  # of the current folder, and of the root
        check_new_directory(output)
    return output.with_name(output.name + ".recovery")


def _strategy(job: RecoverJob, opened: Structure, opener: Opener, own: DenseText | None) -> RecoveryStrategy:
    """The first strategy of the job for which there are the dense model and the memory, with a line that says why.

    How much memory is free plays no part, so that the same command trains alike every time on a machine. Raises
    `ModelError` where the dense model is needed and cannot be opened, and `SettingsError` where no strategy fits.
    """
    dense, missing, reasons = None, None, []
    if own is not None or any(strategy.needs_dense for strategy in job.strategies):
        try:
            dense = dense_structure(opened, opener.catalog, trust_remote_code=opener.load.trust_remote_code)
        except LlmprunerError as error:
            missing = error
    if own is not None and missing is not None:
        raise ModelError(f"{missing}; it would write the examples of --data {own.source}: give --data FILE")
    device = opened.model.device if isinstance(opened, Model) else torch.device(opener.load.device)
    memory = device_bytes(device)
    for strategy in job.strategies:
        if strategy.needs_dense and missing is not None:
            reasons.append(f"{strategy.name} needs the dense model: {missing}")
            continue
        needed = _memory(strategy, opened, dense if strategy.needs_dense else None, job, opener)
        if needed > memory:
            reasons.append(f"{strategy.name} needs about {needed / 2**30:.1f} GiB of memory, of {memory / 2**30:.1f}")
            continue
        because = f", as {reasons[0]}" if reasons else ""
        opener.progress.status(f"strategy {strategy.name}{because}; about {needed / 2**30:.1f} GiB of memory")
        return strategy
    if missing is not None and len(job.strategies) == 1:
        raise missing
    raise SettingsError(
        f"'{opened.ref}' cannot be trained: {'; '.join(reasons)}; --strategy lora, "
        "--set recover.micro_batch_size=1, --cutoff and --dtype bfloat16 take less"
    )


def _memory(
    strategy: RecoveryStrategy, opened: Structure, dense: Structure | None, job: RecoverJob, opener: Opener
) -> int:
    """Bytes that a training takes at least, with gradient checkpointing."""
    dtype = opened.model.dtype if isinstance(opened, Model) else dtype_of(opened, opener.load)
    trained = strategy.trained_parameters(opened.graph)
    models = [opened] if dense is None else [opened, dense]
    weights = sum(loaded_bytes(one, opener.load) for one in models)
    weights += trained * (_WIDE - dtype.itemsize)
    tokens = job.settings.micro_batch_size * job.settings.cutoff
    return training_bytes(opened.config, weights=weights, trained=trained, tokens=tokens, recompute=True)


def _check_disk(strategy: RecoveryStrategy, opened: Structure, output: Path, opener: Opener) -> None:
    """Raise `OutputError` without room for the result and the checkpoints: the newest, the best and the next."""
    size = loaded_bytes(opened, opener.load)
    size += 3 * 3 * _WIDE * strategy.trained_parameters(opened.graph)
    Ranks.current().from_first(lambda: check_space(output, size, "the result and the checkpoints of the training"))


def _check_files(model: Model) -> None:
    """Raise `ModelError` for a model that is not as its files, which adapters name as the model that they are for."""
    record = model.record or {}
    kept = read_any_record(model.path) if model.path is not None and Path(model.path).is_dir() else record
    cuts, trainings = len(record.get("plans") or ()), len((kept or {}).get("recovery") or ())
    if len(model.plans) != cuts or len(record.get("recovery") or ()) != trainings:
        raise ModelError(
            f"'{model.ref}' was pruned or trained in this process, and adapters name the folder of the model that they "
            "are for; save it and pass its folder, or merge the adapters"
        )


def _placed(loaded: Model, opener: Opener) -> Any:
    return placed_as(loaded, opener.load.trust_remote_code)


def _written(
    own: DenseText, loaded: Model, dense: Callable[[], Model], folder: Path, seed: int, opener: Opener
) -> list[Example]:
    """The examples that the dense model writes, kept in ``folder`` for an interrupted run."""
    base = loaded.plans[0].base
    identity = json.dumps([asdict(own), seed, base.model, base.structure, str(loaded.model.dtype)])
    file = folder / f"self-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.jsonl"
    if not file.is_file():
        model = dense()
        if model.tokenizer is None:
            raise no_tokenizer(f"the dense model '{model.ref}'", "it cannot write examples")
        note = format_note(model.ref, model.family, model.tokenizer, "instructions are") if own.answers else None
        if note is not None:
            opener.progress.status(note)
        examples = write_examples(own, model.model, model.tokenizer, model.family, seed, opener.progress)
        write_text(file, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in examples))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [Instruction(**row) if "instruction" in row else Completion(**row) for row in rows]


def _trained(
    job: RecoverJob,
    strategy: RecoveryStrategy,
    loaded: Model,
    data: TrainingData,
    folder: Path,
    load_teacher: Callable[[], Any],
    opener: Opener,
) -> TrainingResult:
    """Of `train`, with messages for the user."""
    progress = opener.progress
    if data.in_format and dense_text_in(job.settings.data) is None:
        note = format_note(loaded.ref, loaded.family, loaded.tokenizer, "examples are")
        if note is not None:
            progress.status(note)
    what = "held-out loss" if data.held_out else "loss on examples"
    with progress.counter("Recovering") as on_step, loaded.changing("recovery"):
        result = train(
            loaded.model, loaded.tokenizer, loaded.graph, data, strategy, job.settings, folder,
            load_teacher=load_teacher, on_step=on_step,
            on_validation=lambda done: progress.status(f"step {done.step}: {what} {done.loss:.4f}"),
        )  # fmt: skip
    for note in result.notes:
        progress.status(note)
    return result


def _save(recovered: Model, directory: Path, folder: Path) -> str:
    """Write the model, with a picture of its losses that is drawn in ``folder``; returns its form."""
    files = []
    training = (recovered.record or {})["recovery"][-1]
    if training["losses"]:
        files.append(folder / "loss.svg")
        write_text(files[0], loss_curve(training))
    return save(recovered, directory, extra_files=files)
