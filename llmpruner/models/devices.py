"""What a device can do: which ones there are, float64, and free memory. Nothing else looks at the name of a device."""

from __future__ import annotations

from functools import cache

import torch


@cache
def _has_float64(kind: str) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=kind)
    except (TypeError, RuntimeError):  # Apple's mps
        return False
    return True


def of_sums(device: torch.device) -> torch.device:
    """Where sums in float64 are kept: on ``device``, or on the host where that has no float64."""
    return device if _has_float64(device.type) else torch.device("cpu")


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in float64, on its device or on the host, see `of_sums`."""
    return tensor.to(of_sums(tensor.device), torch.float64)
