"""A stand-in accelerator for tests: `start` registers PyTorch's device "standin" in this process, see stand_in.cpp."""

import os
import tempfile
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("stand_in.cpp")
BUILD = Path(os.environ.get("STANDIN_BUILD") or Path(tempfile.gettempdir()) / f"llmpruner-standin-{torch.__version__}")
"""Where it is compiled, once for all processes of a test run."""


def compiled():
    """The extension. Raises `RuntimeError` or `OSError` where there is no compiler."""
    BUILD.mkdir(exist_ok=True)
    return cpp_extension.load("stand_in", [str(SOURCE)], extra_cflags=["-O1", "-w"], build_directory=str(BUILD))


def start(*, float64: bool = True, total: int | None = None):
    """Register the device; ``float64``: whether it has it; ``total``: bytes of memory of each of its two. Returns the
    extension, which counts bytes."""
    extension = compiled()
    extension.start(float64)
    for index in range(2):
        if total is not None:
            extension.set_total(index, total)
    if torch._C._get_privateuse1_backend_name() != "standin":
        torch.utils.rename_privateuse1_backend("standin")
        torch._register_device_module("standin", _module(extension))
        torch.utils.generate_methods_for_privateuse1_backend()
        # Without it, `Module.to` makes new parameters on devices of this kind, and ties are lost; CUDA keeps them.
        torch.__future__.set_swap_module_params_on_conversion(True)
    return extension


def _module(extension) -> types.ModuleType:
    """``torch.standin``, as ``torch.cuda`` is for CUDA."""

    def index_of(device=None) -> int:
        index = torch.device(device).index if device is not None and not isinstance(device, int) else device
        return extension.current() if index is None else index

    module = types.ModuleType("torch.standin")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 2
    module.current_device = extension.current
    module.set_device = lambda device: extension.set(index_of(device))
    module.get_device_name = lambda device=None: "stand-in"
    module.manual_seed = module.manual_seed_all = lambda seed: None
    module.synchronize = lambda device=None: None
    module.empty_cache = lambda: None
    module.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    module.set_rng_state = lambda state, device=None: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.memory_allocated = module.memory_reserved = lambda device=None: extension.live(index_of(device))
    module.max_memory_allocated = lambda device=None: extension.peak(index_of(device))
    module.reset_peak_memory_stats = lambda device=None: extension.reset_peak(index_of(device))

    def mem_get_info(device=None) -> tuple[int, int]:
        total = extension.total(index_of(device))
        return total - extension.live(index_of(device)), total

    module.mem_get_info = mem_get_info
    return module
