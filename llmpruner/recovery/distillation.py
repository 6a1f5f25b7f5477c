"""The loss of a distillation, and the dense model's predictions as its targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from ..engine.ranks import Ranks
from ..errors import ModelError, UnsupportedModelError
from ..files import writing
from ..structure.coupling import layer_number
from .adapters import with_adapters
from .base import RecoveryJob, TrainingResult
from .examples import IGNORED
from .schedule import micro_batch
from .token_loss import Term, blocks, mean_over_tokens
from .trainer import ROW, Batch, collator_for, computing
from .training import fit

if TYPE_CHECKING:
    from pathlib import Path

    from .distil import DistilStrategy

_TOP_FILE = "teacher.safetensors"


@dataclass(frozen=True)
class Targets:
    """The dense model's predictions for a batch of (B, T) tokens: ``logits`` (B, T, V), or, where they are kept in a
    file, of the k most likely tokens at each of the N trained positions ``log_p`` (N, k), natural logarithms of
    probabilities at the temperature of the loss, float32, and ``tokens`` (N, k), int64. ``hidden``: after the
    embeddings and after every layer, (B, T, d); None where the loss does not use them.
    """

    logits: torch.Tensor | None = None
    log_p: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    hidden: tuple[torch.Tensor, ...] | None = None


def train_distilled(job: RecoveryJob, settings: DistilStrategy.Settings) -> TrainingResult:
    """Train ``job.model`` as `DistilStrategy` describes.

    Raises `ModelError` where the dense model is not known or has another vocabulary, `UnsupportedModelError` for hidden
    states of different sizes, and as `fit` and `with_adapters` do.
    """
    targets = _targets(job, settings)
    model: Any = job.model
    notes: tuple[str, ...] = ()
    if settings.trains == "lora":
        model, notes = with_adapters(
            job, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout,
            rslora=settings.rslora, dora=settings.dora,
        )  # fmt: skip
    else:
        chosen = touched(job) if settings.trains == "touched" else None
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(chosen is None or name in chosen)
    losses = fit(model, job, _loss(targets, settings, job.layers))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return TrainingResult(model, losses, trainable, notes)


def _loss(
    targets: Callable[[Batch], Targets], settings: DistilStrategy.Settings, layers: tuple[int, ...] | None
) -> Callable[[Any, Batch], torch.Tensor]:
    def loss(model: Any, batch: Batch) -> torch.Tensor:
        wanted = targets(batch)
        found = model(**_inputs(batch), output_hidden_states=wanted.hidden is not None)
        rows, labels = _trained(batch)
        value = mean_over_tokens(found.logits, rows, _term(wanted, rows, labels, settings))
        if wanted.hidden is not None:
            value = value + settings.hidden * _difference(wanted.hidden, found.hidden_states, batch, layers)
        return value

    return loss


def _term(wanted: Targets, rows: torch.Tensor, labels: torch.Tensor, settings: DistilStrategy.Settings) -> Term:
    """The loss per token without the hidden states."""

    def term(logits: torch.Tensor, part: slice) -> torch.Tensor:
        log_q = (logits / settings.temperature).log_softmax(-1)
        if wanted.logits is not None:
            dense = wanted.logits.flatten(0, -2).index_select(0, rows[part]).float()
            log_p = (dense / settings.temperature).log_softmax(-1)
        else:
            assert wanted.tokens is not None and wanted.log_p is not None
            log_q, log_p = _with_rest(log_q.gather(1, wanted.tokens[part])), _with_rest(wanted.log_p[part])
        value = settings.temperature**2 * _divergence(log_p, log_q, settings.divergence)
        if settings.labels:
            next_token = functional.cross_entropy(logits, labels[part], reduction="none")
            value = (1 - settings.labels) * value + settings.labels * next_token
        return value

    return term


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor, kind: str) -> torch.Tensor:
    """(N,), in nats."""
    if kind == "forward":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind == "reverse":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2


def _with_rest(log_p: torch.Tensor) -> torch.Tensor:
    """``log_p`` (N, k) with the logarithm of what is missing to a sum of 1 as a further column."""
    gone = log_p.exp().sum(-1, keepdim=True).clamp_max(1 - 1e-6)
    return torch.cat([log_p, torch.log1p(-gone)], -1)


def _difference(
    wanted: tuple[torch.Tensor, ...], found: tuple[torch.Tensor, ...], batch: Batch, layers: tuple[int, ...] | None
) -> torch.Tensor:
    """Mean over layers of ‖found − wanted‖² / ‖wanted‖², over all tokens that are not padding. ``layers``: the dense
    model's number of each layer; None: the same."""
    numbers = range(len(found) - 1) if layers is None else layers
    # transformers gives the hidden states after the last layer normed.
    pairs = [
        (found[number + 1], wanted[of + 1])
        for number, of in enumerate(numbers)
        if (number + 2 == len(found)) == (of + 2 == len(wanted))
    ]
    if any(one.shape != other.shape for one, other in pairs):
        raise UnsupportedModelError(
            "hidden states of the pruned and of the dense model have different sizes, so they cannot be compared; "
            "leave distil.hidden out"
        )
    real = batch["attention_mask"].bool()
    terms = [
        (one[real].float() - other[real].float()).square().sum() / other[real].float().square().sum()
        for one, other in pairs
    ]
    return torch.stack(terms).mean()


def _inputs(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}


def _trained(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the next token is trained on: rows of logits flattened to (B·T, V), in order, and these next tokens."""
    labels = batch["labels"]
    next_tokens = functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    (rows,) = torch.nonzero(next_tokens != IGNORED, as_tuple=True)
    return rows, next_tokens[rows]


def _targets(job: RecoveryJob, settings: DistilStrategy.Settings) -> Callable[[Batch], Targets]:
    if settings.top:
        return _kept_targets(job, settings)
    teacher = _teacher(job)

    def computed(batch: Batch) -> Targets:
        with torch.no_grad():
            found = teacher(**_inputs(batch), output_hidden_states=bool(settings.hidden))
        return Targets(found.logits, hidden=found.hidden_states if settings.hidden else None)

    return computed


def _teacher(job: RecoveryJob) -> Any:
    teacher = job.teacher()
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (job.model, teacher)]
    if sizes[0] != sizes[1]:
        raise ModelError(f"the dense model predicts {sizes[1]:,} tokens, the pruned one {sizes[0]:,}: no distillation")
    return teacher


def _kept_targets(job: RecoveryJob, settings: DistilStrategy.Settings) -> Callable[[Batch], Targets]:
    """The ``top`` most likely tokens of every trained token, computed once, from a file in the folder of the job."""
    file = job.work_dir / _TOP_FILE
    Ranks.current().from_first(lambda: None if file.is_file() else _write_top(job, settings, file))
    kept = load_file(file)
    counts = torch.tensor([sum(label != IGNORED for label in row["labels"][1:]) for row in _all_rows(job)])
    ends = counts.cumsum(0).tolist()
    starts = [0, *ends[:-1]]

    def read(batch: Batch) -> Targets:
        places = torch.cat([torch.arange(starts[row], ends[row]) for row in batch[ROW].tolist()])
        device = batch["labels"].device
        log_p, tokens = (kept[name][places].to(device) for name in ("log_p", "tokens"))
        return Targets(log_p=log_p.float(), tokens=tokens.long())

    return read


def _all_rows(job: RecoveryJob) -> list[dict[str, list[int]]]:
    return [dict(row) for row in (*job.examples, *job.validation)]


@torch.no_grad()
def _write_top(job: RecoveryJob, settings: DistilStrategy.Settings, file: Path) -> None:
    teacher, collate = _teacher(job), collator_for(job.tokenizer)
    size, parts, rows = micro_batch(job.settings), [], _all_rows(job)
    for first in range(0, len(rows), size):
        batch = {name: tensor.to(job.model.device) for name, tensor in collate(rows[first : first + size]).items()}
        with computing(job):
            logits = teacher(**_inputs(batch)).logits.flatten(0, -2)
        trained, _ = _trained(batch)
        for part in blocks(len(trained), logits.shape[-1]):
            log_p = (logits.index_select(0, trained[part]).float() / settings.temperature).log_softmax(-1)
            found = log_p.topk(min(settings.top, logits.shape[-1]), -1)
            parts.append((found.values.half().cpu(), found.indices.int().cpu()))
    values, indices = zip(*parts, strict=True)
    aside = file.with_suffix(".partial")
    with writing(file):
        save_file({"log_p": torch.cat(values), "tokens": torch.cat(indices)}, aside)
        aside.replace(file)


def touched(job: RecoveryJob) -> set[str]:
    """The names of the parameters whose shape differs from that in the dense model."""
    dense: Mapping[str, nn.Parameter] = dict(job.teacher().named_parameters())
    layers = job.graph.layers

    def in_dense(name: str) -> str:
        number = layer_number(name, layers)
        if number is None or job.layers is None:
            return name
        return f"{layers}.{job.layers[number]}{name.removeprefix(f'{layers}.{number}')}"

    found = {n for n, p in job.model.named_parameters() if dense[in_dense(n)].shape != p.shape}
    if not found:
        raise UnsupportedModelError("the cut changed the shape of no weight, so distil.trains=touched trains nothing")
    return found
