"""Whether matrix products in bfloat16 are faster than in float32 on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")


def computes_bfloat16_fast(model: nn.Module) -> bool:
    """Whether the model is in float32, and its device multiplies faster in bfloat16."""
    parameter = next(model.parameters())
    return parameter.dtype == torch.float32 and multiplies_bfloat16_fast(parameter.device.type)


def with_fast_products(model: nn.Module, run: Callable[[], T]) -> T:
    """``run()``, with products in bfloat16 where that is faster. Where operators of the model refuse what autocast
    gives them (DBRX adds bfloat16 to float32), ``run()`` in the model's own precision."""
    if not computes_bfloat16_fast(model):
        return run()
    try:
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
            return run()
    except RuntimeError:  # another cause raises again
        return run()


def multiplies_bfloat16_fast(device: str) -> bool:
    """Whether a type of device multiplies faster in bfloat16 than in float32."""
    if device == "cpu":
        return _is_bfloat16_faster(_processor())
    return device == "cuda" and torch.cuda.is_bf16_supported()


def _processor() -> Mapping[str, Any]:
    """What torch reports of this processor: older versions report less."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    return {"amx_bf16": getattr(torch.cpu, "_is_amx_tile_supported", bool)()}


def _is_bfloat16_faster(cpu: Mapping[str, Any]) -> bool:
    """True with AMX tiles, or AVX-512 BF16 other than Intel's, which is slower than float32."""
    vectors = bool(cpu.get("avx512_bf16")) and not str(cpu.get("cpu_name", "")).startswith("Intel")
    return bool(cpu.get("amx_bf16")) or vectors
