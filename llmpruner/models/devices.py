"""Whether a device can be used."""

from __future__ import annotations

import torch

from ..errors import LlmprunerError, first_line


def check_device(device: str) -> None:
    """Raises `LlmprunerError` unless torch can compute on ``device``."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise LlmprunerError(f"device '{device}' cannot be used: {first_line(error)}; try --device cpu") from error
