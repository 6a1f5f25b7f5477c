"""Whether products in bfloat16 are faster than in float32 on a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def computes_bfloat16_fast(model: nn.Module) -> bool:
    """Whether this device has units for bfloat16 products, and the model is in float32 so that they would help."""
    parameter = next(model.parameters())
    if parameter.dtype != torch.float32:
        return False
    if parameter.device.type == "cpu":
        return _bfloat16_pays(_processor())
    return parameter.device.type == "cuda" and torch.cuda.is_bf16_supported()


def _processor() -> Mapping[str, Any]:
    """What torch knows of this processor. Older versions tell less of it."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    return {"amx_bf16": getattr(torch.cpu, "_is_amx_tile_supported", bool)()}


def _bfloat16_pays(cpu: Mapping[str, Any]) -> bool:
    """Intel's vectors are slower in bfloat16 than in float32; only its tiles (AMX) are faster."""
    vectors = bool(cpu.get("avx512_bf16")) and not str(cpu.get("cpu_name", "")).startswith("Intel")
    return bool(cpu.get("amx_bf16")) or vectors
