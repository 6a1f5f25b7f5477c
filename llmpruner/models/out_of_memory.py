"""Whether an error says that the machine or the device has no memory left, which says nothing about the model."""

from __future__ import annotations

import torch

_MESSAGES = "allocate memory", "out of memory"
"""Of errors without a class of their own: torch's allocator on CPUs, and its back end MPS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Not for errors of shapes whose messages name a memory object, as oneDNN's do."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES))
