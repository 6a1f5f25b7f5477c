"""Kullback-Leibler divergence between the predictions of two models."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..errors import ModelError


def divergence(wanted_BTV: torch.Tensor, logits_BTV: torch.Tensor) -> float:
    """Sum of KL(wanted ‖ logits) over all positions but the last of each sequence, in nats. Raises `ModelError` for
    different vocabularies."""
    check_vocabularies(wanted_BTV, logits_BTV)
    pairs = zip(wanted_BTV, logits_BTV, strict=True)
    return sum(float(divergences(wanted[:-1], logits[:-1]).double().sum()) for wanted, logits in pairs)


def check_vocabularies(wanted: torch.Tensor, logits: torch.Tensor) -> None:
    """Raise `ModelError` for logits (…, V) of different vocabularies."""
    if wanted.shape != logits.shape:
        raise ModelError(
            f"the model predicts {logits.shape[-1]} tokens and the reference {wanted.shape[-1]}; KL divergence needs "
            "one vocabulary"
        )


def divergences(wanted_TV: torch.Tensor, logits_TV: torch.Tensor) -> torch.Tensor:
    """KL(wanted ‖ logits) at each position (T,), in nats, float32."""
    log_p, log_q = wanted_TV.float().log_softmax(-1), logits_TV.float().to(wanted_TV.device).log_softmax(-1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
