"""The dense model's most likely tokens, computed once and kept in a file, so that it need not be in memory while the
pruned model is trained.

The file, `TOP_FILE` in the folder of the training, has for each of the N trained tokens of all examples, in their
order, ``log_p`` (N, k), natural logarithms of the k largest probabilities at the temperature of the loss, float16, and
``tokens`` (N, k), int32.

Where the dense model is read from its files, it runs layer by layer over all examples: in memory are one of its layers,
or what is outside of them, and hidden states up to the limit of the job. The states are kept from time to time, and an
interrupted run continues from the last ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from ..calibration.chat import IGNORED
from ..engine.journal import Journal
from ..engine.ranks import Ranks
from ..errors import CheckpointError
from ..files import check_space, remove_tree, writing
from ..models.shards import names_in
from ..models.tokenizer import predicted_tokens
from .example_walk import padded, walk_over
from .schedule import micro_batch
from .targets import Targets, check_vocabulary, inputs_of, trained_in
from .token_loss import blocks
from .trainer import ROW, Batch, collator_for, computing

if TYPE_CHECKING:
    from pathlib import Path

    from ..models.weights import Weights
    from .base import RecoveryJob

TOP_FILE = "teacher.safetensors"
_STATES = "predictions"
"""The folder of the hidden states, in that of the training."""
_LABEL = "Predictions of the dense model"
_ENTRY = 2 + 4
"""Bytes of a token's probability and its number."""
_Top = tuple[torch.Tensor, torch.Tensor]
"""``log_p`` and ``tokens`` of some tokens."""


def kept_targets(job: RecoveryJob, *, top: int, temperature: float) -> Callable[[Batch], Targets]:
    """What returns the targets of a batch of the job's examples. The dense model is freed before.

    Raises `ModelError` where it is not known or has another vocabulary, `UnsupportedModelError` where it cannot be run
    layer by layer and does not fit into memory, and `OutputError` where the disk has no room for the file.
    """
    file = job.work_dir / TOP_FILE
    Ranks.current().from_first(lambda: None if _is_whole(file) else _write(job, top, temperature, file))
    job.free_teacher()
    kept = load_file(file)
    counts = torch.tensor([_trained(row) for row in _all_rows(job)])
    ends = counts.cumsum(0).tolist()
    starts = [0, *ends[:-1]]

    def read(batch: Batch) -> Targets:
        places = torch.cat([torch.arange(starts[row], ends[row]) for row in batch[ROW].tolist()])
        device = batch["labels"].device
        log_p, tokens = (kept[name][places].to(device) for name in ("log_p", "tokens"))
        return Targets(log_p=log_p.float(), tokens=tokens.long())

    return read


def _is_whole(file: Path) -> bool:
    """Whether the file is there; after a power failure, it may be cut off."""
    try:
        names_in(file)
    except CheckpointError:
        return False
    return True


def _all_rows(job: RecoveryJob) -> list[dict[str, list[int]]]:
    return [dict(row) for row in (*job.examples, *job.validation)]


def _trained(row: dict[str, list[int]]) -> int:
    """The number of tokens of a row that are trained on; the first of a text is not predicted."""
    return sum(label != IGNORED for label in row["labels"][1:])


@torch.no_grad()
def _write(job: RecoveryJob, top: int, temperature: float, file: Path) -> None:
    size = sum(_trained(row) for row in _all_rows(job)) * top * _ENTRY
    check_space(file, size, "the dense model's most likely tokens")
    parts: list[_Top] = []
    for logits in _by_layer(job, job.walk.open_dense()) if job.walk.open_dense else _in_memory(job):
        log_p = (logits.float() / temperature).log_softmax(-1)
        found = log_p.topk(min(top, logits.shape[-1]), -1)
        parts.append((found.values.half().cpu(), found.indices.int().cpu()))
    values, indices = zip(*parts, strict=True)
    job.check_folder()
    aside = file.with_suffix(".partial")
    with writing(file):
        save_file({"log_p": torch.cat(values), "tokens": torch.cat(indices)}, aside)
        aside.replace(file)
    remove_tree(job.work_dir / _STATES)


def _in_memory(job: RecoveryJob) -> Iterator[torch.Tensor]:
    """Logits (n, V) of the trained tokens of all examples, in order, some at a time."""
    teacher, collate = job.teacher(), collator_for(job.tokenizer, job.model)
    check_vocabulary(job, teacher)
    size, rows = micro_batch(job.settings), _all_rows(job)
    with job.progress.bar(_LABEL) as shown:
        for first in range(0, len(rows), size):
            batch = {name: tensor.to(job.model.device) for name, tensor in collate(rows[first : first + size]).items()}
            with computing(job):
                logits = teacher(**inputs_of(batch)).logits.flatten(0, -2)
            trained, _ = trained_in(batch)
            for part in blocks(len(trained), logits.shape[-1]):
                yield logits.index_select(0, trained[part])
            shown(min(1.0, (first + size) / len(rows)), _LABEL)


def _by_layer(job: RecoveryJob, dense: Weights) -> Iterator[torch.Tensor]:
    """The same, of a dense model that is read from its files."""
    check_vocabulary(job, dense.model)
    size, rows = micro_batch(job.settings), _all_rows(job)
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    ids = [padded([row["input_ids"] for row in part], 0) for part in parts]
    walk = walk_over(job, dense, ids, streams=1, otherwise="use --strategy lora or full, or more memory")
    if not job.settings.autocast:
        # As the dense model in memory, whatever the processor is fast at.
        walk.products = dense.model.dtype
    states, first, count = walk.embedded, 0, len(walk.layers)
    journal = Journal(job.work_dir / _STATES, {"examples": len(rows)})
    journal.check()
    if (found := journal.resume(dense)) is not None:
        state, files = found
        states, first = walk.restored(files["dense"]), state["layers"]
        walk.embedded.clear()
    vocabulary = predicted_tokens(dense.model)
    with job.progress.bar(_LABEL) as shown:
        for number in range(first, count):
            shown(number / (count + 1), f"layer {number}")
            with walk.layer(number):
                walk.advance(number, states)
            # A continued run would lack what the layers have passed on.
            if not walk.passes_on:
                journal.layer_done({"layers": number + 1}, {"dense": states})
        shown(count / (count + 1), "head")
        with dense.outside():
            for position, part in enumerate(parts):
                hidden, batch = states[position], walk.batches[position]
                for place, row in enumerate(part):
                    trained = [at for at, label in enumerate(row["labels"][1:]) if label != IGNORED]
                    for block in blocks(len(trained), vocabulary):
                        at = torch.tensor(trained[block], dtype=torch.int64, device=hidden.device)
                        yield walk.logits(batch, place, hidden[place], at)
