"""Pages of mapped files leave memory, and no value changes by that."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from llmpruner.models import mapped as module
from llmpruner.models.mapped import give_back, pages_given_back

SIZE = 32 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the system has no /proc/self/smaps")


def resident(file: Path) -> int:
    """Bytes of the file in the memory of this process. Of the whole process it would change with what other tests and
    threads do."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        words = line.split(maxsplit=5)
        if not words[0].endswith(":"):
            inside = len(words) == 6 and words[5] == str(file)
        elif inside and words[0] == "Rss:":
            total += int(words[1]) << 10
    return total


@pytest.fixture
def file(tmp_path):
    places = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    if places[next(parent for parent in tmp_path.resolve().parents if parent in places)] == "tmpfs":
        pytest.skip("the folder of the test is in memory, which its files cannot leave")
    path = tmp_path / "weights"
    with path.open("wb") as stream:
        stream.write(b"\1" * SIZE)
        os.fsync(stream.fileno())
    return path


def mapped(file: Path) -> torch.Tensor:
    """As safetensors maps a file: private, and writable."""
    return torch.from_file(str(file), shared=False, size=SIZE, dtype=torch.uint8)


def test_pages_that_were_read_leave_and_can_be_read_again(file):
    tensor = mapped(file)
    assert int(tensor.sum()) == SIZE
    assert resident(file) > SIZE * 0.9
    # The system keeps pages that it has not sorted yet; in use, they are given back five times a second.
    for _ in range(5):
        give_back([f"{file.parent}/"])
    assert resident(file) < SIZE * 0.1
    assert int(tensor.sum()) == SIZE


def test_other_files_and_what_was_written_stay(file, tmp_path):
    tensor = mapped(file)
    tensor[5] = 7
    assert int(tensor.sum()) == SIZE + 6
    give_back([f"{tmp_path}/elsewhere/"])
    assert resident(file) > SIZE * 0.9
    give_back([f"{file.parent}/"])
    assert int(tensor.sum()) == SIZE + 6


def test_pages_are_given_back_at_the_end_of_a_block(file):
    with pages_given_back(file.parent):
        tensor = mapped(file)
        assert int(tensor.sum()) == SIZE
        time.sleep(1)
    assert resident(file) < SIZE * 0.1 and int(tensor[-1]) == 1


def test_what_has_the_address_of_an_unmapped_file_keeps_its_values(file, tmp_path, monkeypatch):
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    with file.open("rb") as stream:
        address = libc.mmap(None, SIZE, mmap.PROT_READ, mmap.MAP_PRIVATE, stream.fileno(), 0)
    ctypes.string_at(address, SIZE)
    earlier = tmp_path / "smaps"
    earlier.write_bytes(Path("/proc/self/smaps").read_bytes())
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(SIZE))
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    assert libc.mmap(address, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, anonymous, -1, 0) == address
    ctypes.memset(address, 7, SIZE)
    monkeypatch.setattr(module, "_SMAPS", earlier)
    give_back([f"{file.parent}/"])
    assert ctypes.string_at(address, SIZE).count(7) == SIZE
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(SIZE))
