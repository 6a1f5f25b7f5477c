"""The story of a recovery: open → data → strategy → train → save."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from ..calibration.conversations import Completion, Example, Instruction
from ..discovery.opening import Opener, Source, check_source, dense_structure, placed_as
from ..engine.ranks import Ranks
from ..engine.stages import Stages, write_run
from ..errors import LlmprunerError, ModelError, SettingsError, no_tokenizer
from ..files import alone_in, check_new_directory, write_text
from ..models.model import Model, Structure
from ..models.numbers import check_device, dtype_of, loaded_bytes
from ..models.opening import load_model, reopened
from ..models.positions import table_of
from ..models.trimmed import in_tokens_of
from ..pruning.saving import save
from .base import TrainingResult
from .data import TrainingData, prepare
from .dense_text import DenseText, write_examples
from .job import JOB_FILE, RecoverJob, check_recover, train

_TRAINED = 16
"""Bytes of each trained number in memory: itself, its gradient and two moments of AdamW, in float32."""


def recover(
    source: Source, job: RecoverJob, output: Path | None, work_dir: Path | None, opener: Opener, *, restart: bool
) -> Model:
    """The trained model. ``output``: where to save it; None: nowhere. ``work_dir``: of the state of the training; by
    default ``OUTPUT.recovery``. Raises as `llmpruner.recover`."""
    check_source(source)
    if output is None and work_dir is None:
        raise SettingsError("recovery needs a directory for its state: give output, or work_dir")
    settings, strategy, dense_text = job.settings, job.strategy, job.dense_text
    check_device(opener.load.device)
    # Processes connect only now.
    ranks = Ranks.current()
    opener = opener.of_ranks(ranks)
    if output is not None:
        ranks.from_first(lambda: check_new_directory(output))
    folder = work_dir or Path(f"{output}.recovery")
    check_recover(job)
    opened = opener.readable(source, "be trained on text")
    if isinstance(opened, Model) and opened.streamed is not None:
        raise ModelError(f"'{opened.ref}' is read layer by layer; pass its folder")
    tokenizer, positions = opener.tokenizer(opened), table_of(opened.config)
    dense = _check_model(job, opened, opener)
    data = None if dense_text else prepare(settings, opened.family, tokenizer, positions=positions)
    if output is not None:
        opener.say_widened(opened)
    with alone_in(folder, JOB_FILE, anew=restart) if ranks.first else nullcontext():
        stages = Stages()
        with stages.stage("loading"):
            loaded = opener.weights(opened)
        load = placed_as(loaded, opener.load.trust_remote_code)

        @functools.cache
        def dense_model() -> Model:
            return load_model(dense or dense_structure(loaded, opener.catalog, opener.load), load)

        if data is None:
            assert dense_text is not None
            with stages.stage("writing examples"):
                written = ranks.from_first(
                    lambda: _written(dense_text, loaded, dense_model, folder, settings.seed, opener)
                )
            examples = {dense_text.source: written}
            data = prepare(settings, opened.family, tokenizer, positions=positions, written=examples)
            if not strategy.needs_dense:
                dense_model.cache_clear()
        with stages.stage("training"):
            teacher = functools.partial(in_tokens_of, loaded, teaching=True)
            result = _trained(job, loaded, data, folder, lambda: teacher(dense_model()), opener)
        history = [*(loaded.record or {}).get("recovery", []), result.details]
        recovered = replace(loaded, model=result.model, record={**(loaded.record or {}), "recovery": history})
        if output is None:
            return loaded.become(recovered)
        with stages.stage("saving"):
            form = ranks.from_first(lambda: save(recovered, output))
        if ranks.first:
            write_run(output, stages, "recover", opened.ref, {**settings.given(), **opener.load.given()})
        loaded.become(reopened(replace(recovered, form=form), output, trust_remote_code=opener.load.trust_remote_code))
        if work_dir is None and ranks.first:
            shutil.rmtree(folder, ignore_errors=True)
        return loaded


def _check_model(job: RecoverJob, opened: Structure, opener: Opener) -> Structure | None:
    """The dense model; None where it is not needed. Refuses one that cannot be opened, and more memory than the machine
    has."""
    dense: Structure | None = None
    models, strategy = [opened], job.strategy
    if job.reads_dense:
        try:
            dense = dense_structure(opened, opener.catalog, opener.load)
        except LlmprunerError as error:
            raise ModelError(f"{error}; without it, give --data FILE and --strategy lora or full") from error
        models += [dense] if strategy.needs_dense else []
    device = opened.model.device if isinstance(opened, Model) else torch.device(opener.load.device)
    dtype = opened.model.dtype if isinstance(opened, Model) else dtype_of(opened, opener.load)
    needed = sum(loaded_bytes(model, opener.load) for model in models)
    needed += strategy.trained_parameters(opened.graph) * (_TRAINED - dtype.itemsize)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = psutil.virtual_memory().total
    if needed > memory:
        raise SettingsError(
            f"{strategy.name} needs {needed / 2**30:.1f} GiB of memory for '{opened.ref}', of {memory / 2**30:.1f}; "
            "--strategy lora and --dtype bfloat16 take less"
        )
    opener.progress.status(f"strategy {strategy.name}: at least {needed / 2**30:.1f} GiB of memory")
    return dense


def _written(
    dense_text: DenseText, loaded: Model, dense: Callable[[], Model], folder: Path, seed: int, opener: Opener
) -> list[Example]:
    """The examples that the dense model writes, kept in ``folder`` for an interrupted run."""
    base = loaded.plans[0].base
    identity = json.dumps([asdict(dense_text), seed, base.model, base.structure, str(loaded.model.dtype)])
    file = folder / f"self-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.jsonl"
    if not file.is_file():
        model = dense()
        if model.tokenizer is None:
            raise no_tokenizer(f"the dense model '{model.ref}'", "it cannot write examples")
        examples = write_examples(dense_text, model.model, model.tokenizer, model.family, seed, opener.progress)
        if not (folder / JOB_FILE).is_file():
            write_text(folder / JOB_FILE, "{}\n")  # until the training identifies itself
        write_text(file, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in examples))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [Instruction(**row) if "instruction" in row else Completion(**row) for row in rows]


def _trained(
    job: RecoverJob, loaded: Model, data: TrainingData, folder: Path, load_teacher: Callable[[], Any], opener: Opener
) -> TrainingResult:
    """Of `train`, with messages for the user."""
    progress = opener.progress
    what = "held-out loss" if data.held_out else "loss on examples"
    if steps := [int(file.name.partition("-")[2]) for file in folder.glob("checkpoint-*")]:
        progress.status(f"continuing the training in {folder} from step {max(steps)}")
    with progress.bar("Recovering") as at, loaded.changing("recovery"):
        return train(
            loaded.model, loaded.tokenizer, loaded.graph, data, job.strategy, job.settings, folder,
            load_teacher=load_teacher,
            on_step=lambda number, total, loss: at(number / total, f"Recovering, step {number}, loss {loss:.3f}"),
            on_validation=lambda step, loss, _: progress.status(f"step {step}: {what} {loss:.4f}"),
        )  # fmt: skip
