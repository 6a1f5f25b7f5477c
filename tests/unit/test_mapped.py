"""Pages of mapped files leave the process, and what was written to a private mapping stays."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from llmpruner.checkpoints.mapped import give_back, pages_given_back

SIZE = 32 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the system has no /proc/self/smaps")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"\1" * SIZE)
    return path


def mapped(file: Path) -> torch.Tensor:
    """As safetensors maps a file: private, and writable."""
    return torch.from_file(str(file), shared=False, size=SIZE, dtype=torch.uint8)


def test_pages_that_were_read_leave_and_can_be_read_again(file):
    tensor = mapped(file)
    assert int(tensor.sum()) == SIZE
    before = resident()
    give_back([f"{file.parent}/"])
    assert before - resident() > SIZE * 0.9
    assert int(tensor.sum()) == SIZE


def test_other_files_and_what_was_written_stay(file, tmp_path):
    tensor = mapped(file)
    tensor[5] = 7
    assert int(tensor.sum()) == SIZE + 6
    before = resident()
    give_back([f"{tmp_path}/elsewhere/", f"{file.parent}/"])
    assert before - resident() < SIZE * 0.1 and int(tensor.sum()) == SIZE + 6


def test_pages_are_given_back_at_the_end_of_a_block(file):
    before = resident()
    with pages_given_back(file.parent):
        tensor = mapped(file)
        assert int(tensor.sum()) == SIZE
    assert resident() - before < SIZE * 0.1 and int(tensor[-1]) == 1
