"""Matrix products in 16 bits between values in float32: whether they are fast on a device, and autocast to them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

T = TypeVar("T")

_NORMS = frozenset({functional.layer_norm, torch.layer_norm, functional.group_norm, torch.group_norm})
_IN_16_BITS = frozenset({torch.bfloat16, torch.float16})


@contextlib.contextmanager
def autocast_to(device: str, dtype: torch.dtype, *, enabled: bool = True) -> Iterator[None]:
    """`torch.autocast`, under which norms take weights in 16 bits for inputs in another dtype, as they do on a GPU; on
    a CPU, torch refuses them."""
    with torch.autocast(device, dtype, enabled=enabled), _WideNorms() if enabled else contextlib.nullcontext():
        yield


class _WideNorms(TorchFunctionMode):
    """While active, weights and biases of norms are in float32 where they are in 16 bits and the inputs are not in the
    same dtype. Their values are the same."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _NORMS:
            dtype = (args[0] if args else kwargs["input"]).dtype
            args = (*args[:1], *(_wide(value, dtype) for value in args[1:]))
            kwargs = {name: value if name == "input" else _wide(value, dtype) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _wide(value: Any, dtype: torch.dtype) -> Any:
    other = isinstance(value, torch.Tensor) and value.dtype in _IN_16_BITS and value.dtype != dtype
    return value.float() if other else value


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
