"""The dense model's predictions, as targets of a distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ..calibration.chat import IGNORED
from ..errors import ModelError
from ..models.tokenizer import predicted_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .base import RecoveryJob
    from .trainer import Batch


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


def check_vocabulary(job: RecoveryJob, dense: PreTrainedModel) -> None:
    """Raise `ModelError` where both models do not predict the same tokens. Reads no weights."""
    sizes = [predicted_tokens(model) for model in (job.model, dense)]
    if sizes[0] != sizes[1]:
        raise ModelError(f"the dense model predicts {sizes[1]:,} tokens, the pruned one {sizes[0]:,}: no distillation")


def inputs_of(batch: Batch) -> dict[str, Any]:
    """The arguments of a model for a batch."""
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}


def trained_in(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the next token is trained on: rows of logits flattened to (B·T, V), in order, and these next tokens."""
    labels = batch["labels"]
    next_tokens = functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    (rows,) = torch.nonzero(next_tokens != IGNORED, as_tuple=True)
    return rows, next_tokens[rows]
