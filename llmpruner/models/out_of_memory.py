"""Whether an error means that the machine or the device has no memory left, and not that the model is at fault.

Imports no torch, as the command line checks every error.
"""

from __future__ import annotations

_MESSAGES = "allocate memory", "out of memory"
"""Of torch's allocators on CPUs and on devices, whose errors are RuntimeErrors."""


def is_out_of_memory(error: BaseException) -> bool:
    """Not for errors of shapes whose messages name a memory object, as oneDNN's do."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
    )
