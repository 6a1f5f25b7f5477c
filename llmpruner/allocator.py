"""How the C library keeps memory that torch frees on a CPU. Imports no torch."""

from __future__ import annotations

import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of ``mallopt`` in glibc's malloc.h."""
_LARGEST, _KEPT = 64 << 20, 256 << 20


def keep_freed_memory() -> None:
    """Let glibc keep up to 256 MiB of freed memory, and reuse it for tensors of up to 64 MiB. Otherwise every large
    tensor gets new pages, which the system clears first. No effect elsewhere than on Linux with glibc. Holds for the
    whole process, so that only programs call it, not libraries."""
    if sys.platform != "linux":
        return
    import ctypes  # takes milliseconds, which help does not need

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_TOP_PAD, _LARGEST)
