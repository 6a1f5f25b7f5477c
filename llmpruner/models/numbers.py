"""Types of numbers: of weights in files and in memory, of matrix products, and on devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..files import read_json
from ..settings import LoadSettings
from ..values import bytes_text
from .devices import CPU, device_of, multiplies_bfloat16_fast

if TYPE_CHECKING:
    from .model import Structure

T = TypeVar("T")

_NORMS = frozenset({functional.layer_norm, torch.layer_norm, functional.group_norm, torch.group_norm})


def dtype_of(structure: Structure, options: LoadSettings) -> torch.dtype:
    """The dtype that the weights have in memory, or will have."""
    if loaded := getattr(structure, "network", None):  # of a `Model`
        return cast("torch.dtype", loaded.dtype)
    if options.dtype != "auto":
        return cast("torch.dtype", getattr(torch, options.dtype))
    stored = stored_dtype(structure) or torch.float32
    return torch.float32 if stored == torch.float16 and device_of(options.device) == CPU else stored


def loaded_bytes(structure: Structure, options: LoadSettings) -> int:
    """Bytes that the weights of a model take in memory."""
    return structure.graph.total_parameters * dtype_of(structure, options).itemsize


def widened(structure: Structure, options: LoadSettings) -> str | None:
    """A line for a model that takes more room once it is saved than it was stored in; None for others."""
    if gguf := structure.reference.gguf_file:
        stored, size = (structure.reference.directory / gguf).stat().st_size, loaded_bytes(structure, options)
        if size < 1.1 * stored:
            return None
        dtype = str(dtype_of(structure, options)).removeprefix("torch.")
        what = f"'{structure.ref}' has {bytes_text(stored)}, in memory and once saved {bytes_text(size)} of {dtype}"
        return f"{what}; quantise the result by export --to gguf --set gguf.quant=q4_k_m"
    if options.dtype != "auto" or stored_dtype(structure) != torch.float16 or dtype_of(structure, options).itemsize < 4:
        return None
    what = f"'{structure.ref}' is stored in float16, and is loaded and saved as float32, in which a CPU computes"
    return f"{what}; --dtype float16 keeps it"


def stored_dtype(structure: Structure) -> torch.dtype | None:
    """The dtype that the configuration states; None where it states none, and for GGUF's own types."""
    if structure.reference.gguf_file:
        return None
    stated = stored_value(structure, "dtype")
    return getattr(torch, stated, None) if isinstance(stated, str) else stated


def stored_value(structure: Structure, name: str) -> Any:
    """The value of ``name`` in ``config.json``. Of a pruned model, `Structure.config` is that of the dense one."""
    value = getattr(structure.config, name, None)
    file = structure.reference.directory / "config.json"
    return value if structure.record is None or not file.is_file() else read_json(file).get(name, value)


@contextlib.contextmanager
def autocast_to(device: str, dtype: torch.dtype, *, enabled: bool = True, caches: bool = True) -> Iterator[None]:
    """`torch.autocast` in which norms take 16-bit weights for other inputs, which torch refuses on a CPU. ``caches``:
    keep the converted weights until the block ends."""
    with (
        torch.autocast(device, dtype, enabled=enabled, cache_enabled=caches),
        _WideNorms() if enabled else contextlib.nullcontext(),
    ):
        yield


class _WideNorms(TorchFunctionMode):
    """Norms get their 16-bit weights and biases in float32 where the inputs are in another dtype."""

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
    in_16_bits = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if in_16_bits and value.dtype != dtype else value


def computes_bfloat16_fast(model: nn.Module) -> bool:
    """Whether the model is in float32, and its device multiplies faster in bfloat16."""
    parameter = next(model.parameters())
    return parameter.dtype == torch.float32 and multiplies_bfloat16_fast(parameter.device.type)


def with_fast_products(model: nn.Module, run: Callable[[], T]) -> T:
    """``run()``, with products in bfloat16 where that is faster and the model's operators accept it (not DBRX)."""
    if computes_bfloat16_fast(model):
        fast = torch.autocast(next(model.parameters()).device.type, torch.bfloat16)
        with contextlib.suppress(RuntimeError), fast:  # another cause raises again below
            return run()
    return run()


def stored_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor itself; of a quantised one, its integers, scales and zero points."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from stored_parts(getattr(tensor, name))
    else:
        yield tensor


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes that ``tensor`` takes; of a quantised one, with its scales."""
    return sum(part.numel() * part.element_size() for part in stored_parts(tensor))


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Name of the first of (name, tensor) pairs with NaN or infinite values; None if all are finite."""
    for name, tensor in tensors:
        for part in stored_parts(tensor):
            # Minimum and maximum are NaN where any value is, and need no copy of the tensor.
            if part.is_floating_point() and part.numel() and not torch.stack(part.detach().aminmax()).isfinite().all():
                return name
    return None
