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
from ..errors import ModelError, OutputError, UnsupportedModelError, first_line
from ..structure.coupling import layer_number
from .adapters import with_adapters
from .base import RecoveryJob, TrainingResult
from .examples import IGNORED
from .trainer import ROW, Batch, collator_for, micro_batch
from .training import fit

if TYPE_CHECKING:
    from pathlib import Path

    from .distil import DistilStrategy

_TOP_FILE = "teacher.safetensors"


@dataclass(frozen=True)
class Targets:
    """The dense model's predictions for the N trained tokens of a batch, at the temperature of the loss.

    ``log_p``: natural logarithms of probabilities, float32: (N, V), or with ``tokens`` (N, k), int64, of these tokens
    alone. ``hidden``: after the embeddings and after every layer, (B, T, d); None where the loss does not use them.
    """

    log_p: torch.Tensor
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
        logits = found.logits[:, :-1][_trained(batch)].float()
        log_q = (logits / settings.temperature).log_softmax(-1)
        log_p = wanted.log_p
        if wanted.tokens is not None:
            log_q, log_p = _with_rest(log_q.gather(1, wanted.tokens)), _with_rest(log_p)
        value = settings.temperature**2 * _divergence(log_p, log_q, settings.divergence).mean()
        if settings.labels:
            labels = batch["labels"][:, 1:][_trained(batch)]
            value = (1 - settings.labels) * value + settings.labels * functional.cross_entropy(logits, labels)
        if wanted.hidden is not None:
            value = value + settings.hidden * _difference(wanted.hidden, found.hidden_states, batch, layers)
        return value

    return loss


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor, kind: str) -> torch.Tensor:
    """(N,), in nats."""
    ratio = log_p - log_q
    forward, reverse = (log_p.exp() * ratio).sum(-1), (log_q.exp() * -ratio).sum(-1)
    return {"forward": forward, "reverse": reverse, "mixed": (forward + reverse) / 2}[kind]


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


def _trained(batch: Batch) -> torch.Tensor:
    """(B, T − 1): whether the next token is trained on."""
    return batch["labels"][:, 1:] != IGNORED


def _targets(job: RecoveryJob, settings: DistilStrategy.Settings) -> Callable[[Batch], Targets]:
    if settings.top:
        return _kept_targets(job, settings)
    teacher = _teacher(job)

    def computed(batch: Batch) -> Targets:
        with torch.no_grad():
            found = teacher(**_inputs(batch), output_hidden_states=bool(settings.hidden))
        log_p = (found.logits[:, :-1][_trained(batch)].float() / settings.temperature).log_softmax(-1)
        return Targets(log_p, hidden=found.hidden_states if settings.hidden else None)

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
        rows = [slice(starts[row], ends[row]) for row in batch[ROW].tolist()]
        device = batch["labels"].device
        log_p, tokens = (torch.cat([kept[name][row] for row in rows]).to(device) for name in ("log_p", "tokens"))
        return Targets(log_p.float(), tokens.long())

    return read


def _all_rows(job: RecoveryJob) -> list[dict[str, list[int]]]:
    return [dict(row) for row in (*job.examples, *job.validation)]


@torch.no_grad()
def _write_top(job: RecoveryJob, settings: DistilStrategy.Settings, file: Path) -> None:
    teacher, collate = _teacher(job), collator_for(job.tokenizer)
    size, parts, rows = micro_batch(job.settings), [], _all_rows(job)
    for first in range(0, len(rows), size):
        batch = {name: tensor.to(job.model.device) for name, tensor in collate(rows[first : first + size]).items()}
        logits = teacher(**_inputs(batch)).logits[:, :-1][_trained(batch)].float() / settings.temperature
        found = logits.log_softmax(-1).topk(min(settings.top, logits.shape[-1]), -1)
        parts.append((found.values.half().cpu(), found.indices.int().cpu()))
    values, indices = zip(*parts, strict=True)
    aside = file.with_suffix(".partial")
    try:
        save_file({"log_p": torch.cat(values), "tokens": torch.cat(indices)}, aside)
        aside.replace(file)
    except Exception as error:
        # safetensors reports a full disk with an exception of its own.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise OutputError(f"{file} cannot be written: {first_line(error)}") from error


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
