"""Timing one run of a session."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .base import Session


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of the prefill, and of all decoding steps after it."""

    prefill: float
    decode: float


def timed(session: Session, tokens: torch.Tensor, new_tokens: int) -> Times:
    """Process ``tokens``, ids of shape (B, T), then decode ``new_tokens`` steps; the two are timed separately."""
    batch, length = tokens.shape
    session.start(batch, length + new_tokens)
    return Times(
        session.milliseconds(partial(session.prefill, tokens)),
        session.milliseconds(partial(session.decode, new_tokens)),
    )
