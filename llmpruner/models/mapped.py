"""Giving back the memory of files that a library has mapped.

Pages of a mapped file that were read count as memory of the process until the file is unmapped, even though the system
could drop them at any time. A library that converts a checkpoint keeps all its files mapped until the last tensor.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

_PAGEOUT = 21
"""``MADV_PAGEOUT`` of Linux (5.4): pages leave memory, and are read again from the file if they are touched. Whatever
is at the address keeps its values. With ``MADV_DONTNEED`` it would not: between finding a mapping and this call, a
library may unmap the file, and the allocator use the address for other data, which would become zeros."""
_SECONDS = 0.2
_SMAPS = Path("/proc/self/smaps")


@contextlib.contextmanager
def pages_given_back(*folders: Path) -> Iterator[None]:
    """While active, five times a second, and at its end, pages of mapped files below ``folders`` leave memory. No value
    changes, whatever is mapped, unmapped or written meanwhile. No effect elsewhere than on Linux, and on files that
    belong to another user and may not be written."""
    if sys.platform != "linux" or not _SMAPS.is_file():
        yield
        return
    places = [str(folder.resolve()) + "/" for folder in folders]
    done = threading.Event()

    def work() -> None:
        while not done.wait(_SECONDS):
            give_back(places)

    thread = threading.Thread(target=work, name="llmpruner-pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        give_back(places)


def give_back(places: list[str]) -> None:
    """Drop the pages of mapped files whose paths begin with one of ``places``."""
    libc = ctypes.CDLL(None, use_errno=True)
    for first, last in _resident(places):
        # An error leaves the pages where they are.
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _PAGEOUT)


def _resident(places: list[str]) -> Iterator[tuple[int, int]]:
    """First and last address of mappings that hold pages of those files, a moment ago."""
    current: tuple[int, int] | None = None
    for line in _SMAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split(maxsplit=5)
        if not words[0].endswith(":"):
            first, _, last = words[0].partition("-")
            ours = len(words) == 6 and words[5].startswith(tuple(places))
            current = (int(first, 16), int(last, 16)) if ours else None
        elif current is not None and words[0] == "Rss:":
            if words[1] != "0":
                yield current
            current = None
