"""Losses over next tokens: the cross entropy, and the divergence from the dense model; a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from ..calibration.chat import IGNORED
from ..models.devices import of_sums
from ..models.tokenizer import check_one_head
from .base import RecoveryJob
from .predictions import Predictions

Batch = Mapping[str, torch.Tensor]
"""Padded rows: ``input_ids``, ``attention_mask`` and ``labels``, int64 (examples, tokens), on the model's device."""
Loss = Callable[[Any, Batch], torch.Tensor]
"""Of a model and a batch: a scalar with gradients, the mean over the batch's trained tokens."""
Term = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Losses (n,) of trained tokens: of float32 logits (n, V), places (n,) of the tokens in the batch, next tokens (n,)."""

_ELEMENTS = 1 << 22  # logits of a block, 16 MiB in float32, which stay in the processor's caches


def distillation_loss(job: RecoveryJob, labels: float) -> Loss:
    """The divergence from the dense model, as `DistilStrategy` describes, with a share ``labels`` of cross entropy."""
    if job.predictions is not None:
        return _from_predictions(job.predictions, labels)
    teacher = job.teacher()
    check_one_head(teacher, job.model)

    def loss(model: Any, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            dense_NV = teacher(**_inputs(batch)).logits.flatten(0, -2)

        def term(logits: torch.Tensor, places: torch.Tensor, next_tokens: torch.Tensor) -> torch.Tensor:
            log_q = logits.log_softmax(-1)
            log_p = dense_NV.index_select(0, places).float().log_softmax(-1)
            value: torch.Tensor = (log_p.exp() * (log_p - log_q)).sum(-1)
            return _with_labels(value, labels, logits, next_tokens)

        return mean_over_tokens(model(**_inputs(batch)).logits, batch["labels"], term)

    return loss


def _from_predictions(predictions: Predictions, labels: float) -> Loss:
    """The same by what is kept of the dense model's predictions, which gives it in expectation."""

    def loss(model: Any, batch: Batch) -> torch.Tensor:
        predicted = predictions.of(batch)
        # Of each place in the batch, the number of its trained token.
        numbers = trained_places(batch["labels"]).flatten().cumsum(0) - 1

        def term(logits: torch.Tensor, places: torch.Tensor, next_tokens: torch.Tensor) -> torch.Tensor:
            tokens, weights, information = (each[numbers[places]] for each in predicted)
            log_q = logits.gather(1, tokens) - logits.logsumexp(-1, keepdim=True)
            return _with_labels(information - (weights * log_q).sum(-1), labels, logits, next_tokens)

        return mean_over_tokens(model(**_inputs(batch)).logits, batch["labels"], term)

    return loss


def _with_labels(value: torch.Tensor, share: float, logits: torch.Tensor, next_tokens: torch.Tensor) -> torch.Tensor:
    if share:
        value = (1 - share) * value + share * functional.cross_entropy(logits, next_tokens, reduction="none")
    return value


def next_token_loss(model: Any, batch: Batch) -> torch.Tensor:
    return mean_over_tokens(model(**_inputs(batch)).logits, batch["labels"], _cross_entropy)


def _inputs(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}


def _cross_entropy(logits: torch.Tensor, _: torch.Tensor, next_tokens: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, next_tokens, reduction="none")


def trained_places(labels_BT: torch.Tensor) -> torch.Tensor:
    """Whether the token after each is trained on, (B, T)."""
    return functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED) != IGNORED


def trained_tokens(batch: Batch) -> int:
    """How many tokens of a batch are predicted and have a loss."""
    return int(trained_places(batch["labels"]).sum())


def mean_over_tokens(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, term: Term) -> torch.Tensor:
    """Mean of ``term`` over the tokens whose next one is trained on: a scalar in float32, 0 where there is none.

    The gradient is computed along with the loss, block by block, so that there is only one more tensor of the logits'
    size; plain autograd would keep several, and take more time than a small model's own computation. Only
    ``logits_BTV`` gets a gradient, once.
    """
    next_tokens = functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED).flatten()
    (places,) = torch.nonzero(next_tokens != IGNORED, as_tuple=True)
    compute: Any = _MeanOverTokens.apply  # torch types it in some versions
    mean: torch.Tensor = compute(logits_BTV.flatten(0, -2), places, next_tokens[places], term)
    return mean


class _MeanOverTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, places: torch.Tensor, next_tokens: torch.Tensor, term: Term) -> Any:
        count, needed = len(places), ctx.needs_input_grad[0]
        size = max(1, _ELEMENTS // logits.shape[-1])
        total = torch.zeros((), dtype=torch.float64, device=of_sums(logits.device))
        gradient = torch.zeros_like(logits) if needed else None
        # The precision of the loss is float32 wherever it is called.
        with torch.autocast(logits.device.type, enabled=False):
            for at, expected in zip(torch.split(places, size), torch.split(next_tokens, size), strict=True):
                block = logits.index_select(0, at).float().requires_grad_(needed)
                with torch.set_grad_enabled(needed):
                    loss = term(block, at, expected).sum()
                total += loss.detach().to(total.device)
                if gradient is not None:
                    (of_block,) = torch.autograd.grad(loss, block)
                    gradient.index_copy_(0, at, of_block.div_(count).to(gradient.dtype))
        ctx.gradient = gradient
        return (total / max(count, 1)).float().to(logits.device)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(upstream[0]), None, None, None
