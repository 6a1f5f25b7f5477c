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

_DONTNEED = 4
"""``MADV_DONTNEED`` of Linux: pages leave the process, and are read again from the file if they are touched."""
_SECONDS = 0.2
_SMAPS = Path("/proc/self/smaps")


@contextlib.contextmanager
def pages_given_back(*folders: Path) -> Iterator[None]:
    """While active, five times a second, and at its end, pages of mapped files below ``folders`` leave the memory of
    this process. A mapping that was written to is left alone; nothing may write to the others meanwhile, as what is
    written to a private mapping leaves with its pages. No effect elsewhere than on Linux."""
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
    for first, last in _untouched(places):
        # An error leaves the pages where they are.
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONTNEED)


def _untouched(places: list[str]) -> Iterator[tuple[int, int]]:
    """First and last address of mappings that hold pages of those files, and none that was written to."""
    current: tuple[int, int] | None = None
    resident = False
    for line in _SMAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split(maxsplit=5)
        if not words[0].endswith(":"):
            first, _, last = words[0].partition("-")
            ours = len(words) == 6 and words[5].startswith(tuple(places))
            current, resident = ((int(first, 16), int(last, 16)) if ours else None), False
        elif current is not None and words[0] == "Rss:":
            resident = words[1] != "0"
        elif current is not None and words[0] == "Anonymous:":
            if resident and words[1] == "0":
                yield current
            current = None
