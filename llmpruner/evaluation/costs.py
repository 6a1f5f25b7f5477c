"""Costs of a model: parameters, memory, arithmetic, and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..models.generation import sample_tokens
from ..models.meta import decoder_layers, macs_per_token
from ..models.positions import check_table
from ..progress import QUIET, Progress
from .bench import Measurement, measurement, timed
from .transformers_runtime import TorchSession

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.coupling import CouplingGraph


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters (tied ones once), those in the decoder layers, bytes of the weights in memory, and multiply-accumulate
    operations to decode one token with ``context`` tokens in the cache."""

    parameters: int
    decoder_parameters: int
    weight_bytes: int
    macs_per_token: int
    context: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second at batch size 1. ``peak_bytes``: peak memory of the process (CUDA: of the allocator) while
    measuring, including other models; None where the system does not report it."""

    prefill: Measurement
    decode: Measurement
    prompt_tokens: int
    new_tokens: int
    peak_bytes: int | None

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Speed:
        """From its JSON values."""
        spread = {name: Measurement(**result[name]) for name in ("prefill", "decode")}
        return cls(**{**result, **spread})


def size(model: PreTrainedModel, graph: CouplingGraph, *, context: int = 512) -> Size:
    """Parameters, bytes and multiply-accumulate operations of ``model``, which may be on the meta device.

    ``graph``: the coupling graph of this model (after a cut, of the cut one), for the widths of attention.
    ``context``: tokens in the cache when operations are counted.
    """
    prefix = decoder_layers(model) + "."
    own = dict(model.named_parameters())
    return Size(
        parameters=sum(p.numel() for p in own.values()),
        decoder_parameters=sum(p.numel() for name, p in own.items() if name.startswith(prefix)),
        weight_bytes=sum(p.numel() * p.element_size() for p in own.values()),
        macs_per_token=macs_per_token(model, graph, context=context),
        context=context,
    )


def speed(
    model: PreTrainedModel,
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    runs: int = 5,
    seed: int = 0,
    progress: Progress = QUIET,
) -> Speed:
    """Tokens per second at batch size 1, on random tokens: of processing a prompt (prefill), and of greedy decoding
    with the cache.

    A run processes ``prompt_tokens`` tokens and predicts the next one, then decodes ``new_tokens`` tokens; the two are
    timed separately. The first of ``runs + 1`` runs is not counted. Raises `DataError` for a model with
    fewer positions.
    """
    check_table(model, prompt_tokens + new_tokens, *beyond(prompt_tokens, new_tokens))
    prompt = sample_tokens(model, prompt_tokens, seed)
    _reset_peak_memory(model.device)
    session = TorchSession(model)
    times = [timed(session, prompt, new_tokens) for _ in progress.track(range(runs + 1), "speed")][1:]
    return Speed(
        measurement([prompt_tokens * 1e3 / run.prefill for run in times]),
        measurement([new_tokens * 1e3 / run.decode for run in times]),
        prompt_tokens,
        new_tokens,
        _peak_memory(model.device),
    )


def beyond(prompt_tokens: int, new_tokens: int) -> tuple[str, str]:
    """What is beyond a model's positions, and how to get less, for messages."""
    return f"{prompt_tokens:,} + {new_tokens:,} tokens", "lower --set speed.prompt_tokens=N or speed.new_tokens=N"


_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        # Writing 5 resets the high-water mark of the resident set (proc(5)).
        _CLEAR.write_text("5")


def _peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes since the reset: of CUDA's allocator or, on Linux, of the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = _STATUS.read_text().splitlines() if _CLEAR.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
