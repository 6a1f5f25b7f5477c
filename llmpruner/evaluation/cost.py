"""What a model costs: parameters, memory, arithmetic, and time."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..coupling import ATTENTION, Role
from ..families import decoder_layers
from ..progress import Progress
from .report import Measurement, Size, Speed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..coupling import CouplingGraph


def size(model: PreTrainedModel, graph: CouplingGraph, *, context: int = 512) -> Size:
    """Parameters, bytes and arithmetic of ``model``, from shapes alone (meta tensors will do).

    ``graph`` is the coupling graph of the model as it is; its attention groups say how wide attention is.
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


def macs_per_token(model: PreTrainedModel, graph: CouplingGraph, *, context: int = 512) -> int:
    """Multiply-accumulate operations to decode one token while ``context`` tokens are in the cache.

    One per weight of every linear layer, the language model head included (also where it is tied to the
    embedding, which itself is a look-up); of expert weights, the share of experts that a token visits; and
    for attention, ``context`` products per channel for the scores and again for the values.
    """
    weights = sum(
        parameter.numel() if visited is None else parameter.numel() // parameter.shape[0] * visited
        for _, parameter, visited in multiplied(model)
    )
    width = sum(
        span.index.width * group.units
        for group in graph.of_kinds([ATTENTION])
        for span in group.spans_with(Role.CONSUMES)
    )
    return weights + 2 * context * width


def multiplied(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter, int | None]]:
    """The parameters that every token is multiplied by: (name, parameter, for weights of experts, stacked along the
    first axis, how many of them a token visits)."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            if parameter.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd):
                config = model.config.get_text_config()
                yield name, parameter, int(getattr(config, "num_experts_per_tok", parameter.shape[0]))
            elif parameter.ndim >= 2:
                yield name, parameter, None


def speed(
    model: PreTrainedModel,
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    runs: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> Speed:
    """Tokens per second at batch size 1, on random tokens: reading a prompt, and greedy decoding with the
    cache.

    One run warms up and is not counted. Decoding is timed after the prompt, ``new_tokens`` steps per run.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(model.config.get_text_config().vocab_size)
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=generator).to(model.device)
    memory = _PeakMemory(model.device)
    prefill, decode = [], []
    for run in (progress or Progress()).track(range(runs + 1), "speed"):
        seconds, more = _timed(model, prompt, new_tokens)
        if run:
            prefill.append(prompt_tokens / seconds)
            decode.append(new_tokens / more)
    return Speed(_measurement(prefill), _measurement(decode), prompt_tokens, new_tokens, memory.peak())


@torch.inference_mode()
def _timed(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt, and for ``new_tokens`` steps after it."""
    from transformers import DynamicCache

    cache = {cache_argument(model): DynamicCache(config=model.config)}
    started = _now(model.device)
    logits = model(input_ids=prompt, use_cache=True, **cache).logits
    between = _now(model.device)
    for _ in range(new_tokens):
        logits = model(input_ids=logits[:, -1:].argmax(-1), use_cache=True, **cache).logits
    return between - started, _now(model.device) - between


def cache_argument(model: PreTrainedModel) -> str:
    """What ``forward`` calls its key/value cache; transformers is renaming it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _measurement(values: list[float]) -> Measurement:
    return Measurement(statistics.median(values), min(values), max(values), len(values))


class _PeakMemory:
    """The most memory held since this was created: CUDA's allocator, or on Linux the resident set."""

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
