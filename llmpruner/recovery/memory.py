"""Whether the values that a backward pass needs are kept, or computed again (gradient checkpointing)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
import torch

from ..engine.ranks import Ranks
from ..errors import UnsupportedModelError
from .base import RecoveryJob
from .schedule import micro_batch

if TYPE_CHECKING:
    from ..settings import RecoverSettings

_BYTES_PER_TOKEN_AND_CHANNEL = 34
"""Kept in a layer per token and channel of the hidden states, at 16 bits, without the scores of attention, which its
kernels compute again (Korthikanti et al., 2022, equation 1)."""
KEPT_VALUES = "values for the backward pass"
"""Their name in `training_bytes`; with gradient checkpointing, those of one layer at a time."""
_SHARE = 0.8
"""Of the free memory that may be used."""


@contextmanager
def recomputing(model: Any, job: RecoveryJob) -> Iterator[bool]:
    """A block in which ``model``, which is that of the job or a peft model around it, is trained with gradient
    checkpointing if the settings say so, or, with ``auto``, if there is no other way. Gives whether it is. Raises
    `UnsupportedModelError` for a model that cannot be trained so."""
    wanted = job.settings.gradient_checkpointing
    able = bool(getattr(model, "supports_gradient_checkpointing", False))
    if wanted == "on" and not able:
        kind = type(getattr(model, "base_model", model)).__name__
        raise UnsupportedModelError(f"{kind} has no gradient checkpointing; give --gradient-checkpointing off")
    if wanted == "off" or not able or (wanted == "auto" and _fits(model, job)):
        yield False
        return
    # transformers has renamed the methods.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield True
    finally:
        getattr(model, f"{name}_checkpointing_disable")()


def _fits(model: Any, job: RecoveryJob) -> bool:
    return needed(model, job) <= _SHARE * free_bytes(next(model.parameters()).device)


def needed(model: Any, job: RecoveryJob) -> int:
    """Estimated bytes that training takes besides the weights: gradients and Adam's two moments, and
    `training_bytes`."""
    vocabulary, channels = job.model.get_input_embeddings().weight.shape
    item = next(model.parameters()).element_size()
    beside = training_bytes(job.settings, vocabulary, channels, job.graph.num_layers, item)
    states = sum(3 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return int(states + sum(beside.values()))


def training_bytes(settings: RecoverSettings, vocabulary: int, channels: int, layers: int, item: int) -> dict[str, int]:
    """Estimated bytes, by what takes them, of the values kept for the backward pass of one micro-batch, and of logits
    with their gradient in float32. ``item``: bytes of a weight."""
    tokens = micro_batch(settings, Ranks.current().count) * settings.cutoff
    width = 2 if settings.autocast else item
    return {
        KEPT_VALUES: tokens * channels * layers * _BYTES_PER_TOKEN_AND_CHANNEL * width // 2,
        "logits": 3 * tokens * vocabulary * 4,
    }


def free_bytes(device: torch.device) -> int:
    """Of the memory of a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
