"""Hidden states beyond the limit of memory are in a file, bit for bit."""

import errno

import pytest
import torch

from llmpruner import OutputError
from llmpruner.engine import boundaries as module
from llmpruner.engine.boundaries import Boundaries, States


def tensors(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, generator=generator).to(dtype) for _ in range(count)]


def states_of(kept, tensors):
    states = States(kept)
    for tensor in tensors:
        states.append(tensor)
    return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_come_back_bit_for_bit(dtype, tmp_path):
    kept = Boundaries(tmp_path, 2 * 15 * dtype.itemsize)
    states = states_of(kept, tensors(4, dtype))
    assert (kept.in_memory, kept._end) == (2 * 15 * dtype.itemsize,) * 2
    assert all(torch.equal(found, wanted) for found, wanted in zip(states, tensors(4, dtype), strict=True))
    assert list(tmp_path.iterdir()) == [], "the file has no name"


def test_places_in_the_file_are_used_again(tmp_path):
    kept = Boundaries(tmp_path, 0)
    states = states_of(kept, tensors(2))
    states[0] = states[1] + 1
    states.clear()
    again = states_of(kept, tensors(2))
    assert kept._end == 2 * 60
    assert torch.equal(again[1], tensors(2)[1])


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(OutputError, match=r"hidden states in a temporary file in '.*' cannot be written: no space"):
        states_of(Boundaries(tmp_path, 0), tensors(1))
