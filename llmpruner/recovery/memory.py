"""What a training takes of the memory of its device: an estimate, by which what cannot fit is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_BYTES_PER_TOKEN_AND_CHANNEL = 34
"""Kept in a layer for the backward pass per token and channel of the hidden states, at 16 bits, without the scores of
attention, which its kernels compute again (Korthikanti et al., 2022, equation 1)."""
_FLOAT32 = 4


def training_bytes(
    config: PreTrainedConfig, *, weights: int, trained: int, tokens: int, recompute: bool = False
) -> int:
    """About how many bytes a training takes.

    ``weights``: bytes of all models in memory. ``trained``: number of parameters with gradients, which have two moments
    of AdamW. ``tokens``: of a micro-batch. ``recompute``: with gradient checkpointing, which keeps the values of one
    layer at a time. Sizes that a configuration calls otherwise are left out.
    """
    text: Any = config.get_text_config()
    channels, layers, vocabulary = (
        int(getattr(text, name, 0) or 0) for name in ("hidden_size", "num_hidden_layers", "vocab_size")
    )
    kept = tokens * channels * _BYTES_PER_TOKEN_AND_CHANNEL * (1 if recompute else layers)
    # The logits, those of a second model, and their gradient.
    logits = 3 * tokens * vocabulary * _FLOAT32
    return weights + 3 * trained * _FLOAT32 + kept + logits


def free_bytes(device: torch.device) -> int:
    """Free memory of a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def device_bytes(device: torch.device) -> int:
    """Memory of a device, free or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)
