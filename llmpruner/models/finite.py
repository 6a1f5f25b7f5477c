"""Finding NaN and infinite values in weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .stored import stored_parts


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Name of the first tensor of (name, tensor) pairs that contains NaN or infinite values; None if all are finite."""
    for name, tensor in tensors:
        for part in stored_parts(tensor):
            # Minimum and maximum are NaN where any value is, and need no copy of the tensor.
            is_float = part.is_floating_point() and part.numel()
            if is_float and not all(torch.isfinite(bound) for bound in torch.aminmax(part.detach())):
                return name
    return None
