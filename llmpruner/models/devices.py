"""What a device can do: which ones there are, free memory, float64, fast products. Nothing else looks at its name."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import psutil
import torch

from ..errors import LlmprunerError, first_line
from ..values import bytes_text

CPU = torch.device("cpu")


@cache
def device_of(name: str) -> torch.device:
    """The device called ``name``; "auto" is the accelerator that torch finds (CUDA, ROCm, XPU, MPS …), else the CPU. Of
    several of one kind without a number, each process of a machine takes its own. Raises `LlmprunerError` for a device
    that cannot compute."""
    try:
        device = torch.device(name) if name != "auto" else _accelerator() or CPU
        if device != CPU and ":" not in str(device):
            count = torch.get_device_module(device).device_count()
            device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")) % max(count, 1))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        there, found = ["cpu"], _accelerator()
        if found is not None:
            there += [f"{found.type}:{number}" for number in range(torch.accelerator.device_count())]
        reason = first_line(error).partition(". ")[0]
        raise LlmprunerError(f"device '{name}' cannot be used: {reason}; there is {', '.join(there)}") from error
    return device


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator(check_available=True)


def free_memory(device: torch.device) -> int:
    """Bytes of memory of ``device`` that this process can still take."""
    return _memory(device)[0]


def total_memory(device: torch.device) -> int:
    """Bytes of memory that ``device`` has; of the host, with what it can swap."""
    return _memory(device)[1]


def _memory(device: torch.device) -> tuple[int, int]:
    host = psutil.virtual_memory()
    if device == CPU:
        return int(host.available), int(host.total + psutil.swap_memory().total)
    module: Any = torch.get_device_module(device)
    module.empty_cache()  # the allocator keeps what tensors have freed
    if device.type == "mps":  # it shares the host's
        total = int(module.recommended_max_memory())
        return min(total - int(module.driver_allocated_memory()), int(host.available)), total
    free, total = module.mem_get_info(device)
    return int(free), int(total)


def processes_on(device: torch.device) -> int:
    """How many processes of this machine compute on ``device``, and share its memory."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return processes if device == CPU else -(-processes // torch.get_device_module(device).device_count())


def named(device: torch.device) -> str:
    name = getattr(torch.get_device_module(device), "get_device_name", lambda _: "")(device)
    return f"{device} ({name})" if name else str(device)


def described(device: torch.device) -> str:
    """The name of a device, with its free memory, for the first line of a command."""
    return f"{named(device)}, {bytes_text(free_memory(device))} of memory free"


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has computed all that it was told to."""
    torch.get_device_module(device).synchronize()


@cache
def _has_float64(kind: str) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=kind)
    except (TypeError, RuntimeError):  # Apple's mps
        return False
    return True


def of_sums(device: torch.device) -> torch.device:
    """Where sums in float64 are kept: on ``device``, or on the host where that has no float64."""
    return device if _has_float64(device.type) else CPU


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in float64, on its device or on the host, see `of_sums`."""
    return tensor.to(of_sums(tensor.device), torch.float64)


def multiplies_bfloat16_fast(kind: str) -> bool:
    """Whether a type of device multiplies faster in bfloat16 than in float32."""
    if kind == "cpu":
        # Versions of torch before 2.11 do not tell. AVX-512 BF16 of Intel is slower than float32.
        cpu: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        vectors = bool(cpu.get("avx512_bf16")) and not str(cpu.get("cpu_name", "")).startswith("Intel")
        return bool(cpu.get("amx_bf16")) or vectors
    supported = getattr(torch.get_device_module(kind), "is_bf16_supported", None)  # mps has none
    return bool(supported and supported(including_emulation=False))
