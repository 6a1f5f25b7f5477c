"""Costs of a model: parameters, memory, arithmetic, and time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..models.arithmetic import macs_per_token
from ..models.decoder import decoder_layers
from ..models.decoding import sample_tokens
from ..models.position_tables import check_table
from ..progress import Progress
from .results import Size, Speed
from .speed.results import measurement
from .speed.timing import timed
from .speed.torch_session import TorchSession

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.coupling import CouplingGraph


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
    progress: Progress | None = None,
) -> Speed:
    """Tokens per second at batch size 1, on random tokens: of processing a prompt (prefill), and of greedy decoding
    with the cache.

    A run processes ``prompt_tokens`` tokens and predicts the next one, then decodes ``new_tokens`` tokens; the two are
    timed separately. The first of ``runs + 1`` runs is not counted. Raises `DataError` for a model with
    fewer positions.
    """
    check_table(model, prompt_tokens + new_tokens, *beyond(prompt_tokens, new_tokens))
    prompt = sample_tokens(model, prompt_tokens, seed)
    memory = _PeakMemory(model.device)
    session = TorchSession(model)
    found = [timed(session, prompt, new_tokens) for _ in (progress or Progress()).track(range(runs + 1), "speed")][1:]
    return Speed(
        measurement([prompt_tokens * 1e3 / times.prefill for times in found]),
        measurement([new_tokens * 1e3 / times.decode for times in found]),
        prompt_tokens,
        new_tokens,
        memory.peak(),
    )


def beyond(prompt_tokens: int, new_tokens: int) -> tuple[str, str]:
    """What is beyond a model's positions, and how to get less, for messages."""
    return f"{prompt_tokens:,} + {new_tokens:,} tokens", "lower --set speed.prompt_tokens=N or speed.new_tokens=N"


class _PeakMemory:
    """Peak memory in bytes since its creation: of CUDA's allocator or, on Linux, of the resident set."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            # Writing 5 resets the high-water mark of the resident set (proc(5)).
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._known = False

    def peak(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if not self._known:
            return None
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
