"""A stand-in accelerator for tests: `start` registers PyTorch's device "standin" in this process, see stand_in.cpp."""

import ctypes
import hashlib
import subprocess
import types
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("stand_in.cpp")
COMPILER = "g++"
COUNT = 2


def compiled() -> Path:
    """The library, compiled by the first process that asks for it, in ten seconds; the others wait. Raises `OSError`
    where there is no compiler, and `CalledProcessError` where it fails."""
    key = hashlib.sha256(
        f"{torch.__version__} {torch.__file__}".encode()
        + b"".join(file.read_bytes() for file in (SOURCE, Path(__file__)))
    ).hexdigest()[:12]
    library = SOURCE.parent / "__pycache__" / f"stand_in-{key}.so"
    library.parent.mkdir(exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            options = ["-std=c++20", "-O0", "-w", "-shared", "-fPIC"]
            options += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
            options += [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
            libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
            aside = library.with_suffix(".partial")
            subprocess.run([COMPILER, *options, str(SOURCE), "-o", str(aside), *libraries], check=True)
            aside.replace(library)
    return library


def start(*, float64: bool = True, bfloat16: bool = False, total: int = 1 << 40) -> ctypes.CDLL:
    """Register the device, or change what it has: ``float64``; ``bfloat16``: products that are faster than those of
    float32; ``total``: bytes of memory of each of the two. Returns the library, which counts bytes."""
    library = ctypes.CDLL(str(compiled()))
    for name in ("live", "peak", "total"):
        getattr(library, name).restype = ctypes.c_size_t
    library.set_float64(float64)
    for index in range(COUNT):
        library.set_total(index, ctypes.c_size_t(total))
    if torch._C._get_privateuse1_backend_name() != "standin":
        library.register_device()
        torch.utils.rename_privateuse1_backend("standin")
        torch._register_device_module("standin", _module(library))
        torch.utils.generate_methods_for_privateuse1_backend()
        # Without it, `Module.to` makes new parameters on devices of this kind, and ties are lost; CUDA keeps them.
        torch.__future__.set_swap_module_params_on_conversion(True)
    torch.get_device_module("standin").is_bf16_supported = lambda including_emulation=True: bfloat16
    return library


def _module(library: ctypes.CDLL) -> types.ModuleType:
    """``torch.standin``, as ``torch.cuda`` is for CUDA."""

    def index_of(device=None) -> int:
        index = torch.device(device).index if device is not None and not isinstance(device, int) else device
        return library.get_current() if index is None else index

    module = types.ModuleType("torch.standin")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: COUNT
    module.current_device = library.get_current
    module.set_device = lambda device: library.set_current(index_of(device))
    module.get_device_name = lambda device=None: "stand-in"
    module.manual_seed = module.manual_seed_all = lambda seed: None
    module.synchronize = lambda device=None: None
    module.empty_cache = lambda: None
    module.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    module.set_rng_state = lambda state, device=None: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.memory_allocated = module.memory_reserved = lambda device=None: library.live(index_of(device))
    module.max_memory_allocated = lambda device=None: library.peak(index_of(device))
    module.reset_peak_memory_stats = lambda device=None: library.reset_peak(index_of(device))

    def mem_get_info(device=None) -> tuple[int, int]:
        total = library.total(index_of(device))
        return total - library.live(index_of(device)), total

    module.mem_get_info = mem_get_info
    return module
