"""The loss of a distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from ..errors import UnsupportedModelError
from ..structure.coupling import layer_number
from .adapters import with_adapters
from .base import RecoveryJob, TrainingResult
from .kept_targets import kept_targets
from .targets import Targets, check_vocabulary, inputs_of, trained_in
from .token_loss import Term, mean_over_tokens
from .trainer import Batch
from .training import fit_weights

if TYPE_CHECKING:
    from .distil_settings import DistilSettings


def train_distilled(job: RecoveryJob, settings: DistilSettings) -> TrainingResult:
    """Train ``job.model`` as `DistilStrategy` describes.

    Raises `ModelError` where the dense model is not known or has another vocabulary, `UnsupportedModelError` for hidden
    states of different sizes, and as `fit` and `with_adapters` do.
    """
    chosen = touched(job) if settings.trains == "touched" else None
    targets = _targets(job, settings)
    model: Any = job.model
    notes: tuple[str, ...] = ()
    if settings.trains == "lora":
        model, notes = with_adapters(
            job, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout,
            rslora=settings.rslora, dora=settings.dora,
        )  # fmt: skip
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(chosen is None or name in chosen)
    losses = fit_weights(model, job, _loss(targets, settings, job.layers), float32=settings.float32)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return TrainingResult(model, losses, trainable, notes)


def _loss(
    targets: Callable[[Batch], Targets], settings: DistilSettings, layers: tuple[int, ...] | None
) -> Callable[[Any, Batch], torch.Tensor]:
    def loss(model: Any, batch: Batch) -> torch.Tensor:
        wanted = targets(batch)
        found = model(**inputs_of(batch), output_hidden_states=wanted.hidden is not None)
        rows, labels = trained_in(batch)
        value = mean_over_tokens(found.logits, rows, _term(wanted, rows, labels, settings))
        if wanted.hidden is not None:
            value = value + settings.hidden * _difference(wanted.hidden, found.hidden_states, batch, layers)
        return value

    return loss


def _term(wanted: Targets, rows: torch.Tensor, labels: torch.Tensor, settings: DistilSettings) -> Term:
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


def _targets(job: RecoveryJob, settings: DistilSettings) -> Callable[[Batch], Targets]:
    if settings.top:
        return kept_targets(job, top=settings.top, temperature=settings.temperature)
    teacher = job.teacher()
    check_vocabulary(job, teacher)

    def computed(batch: Batch) -> Targets:
        with torch.no_grad():
            found = teacher(**inputs_of(batch), output_hidden_states=bool(settings.hidden))
        return Targets(found.logits, hidden=found.hidden_states if settings.hidden else None)

    return computed


def touched(job: RecoveryJob) -> set[str]:
    """The names of the parameters whose shape differs from that in the dense model."""
    whole = job.walk.open_dense().model if job.walk.open_dense else job.teacher()
    dense: Mapping[str, nn.Parameter] = dict(whole.named_parameters())
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
