"""Whether all weights are finite: the score of a task is a number even where they are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_weights(model: PreTrainedModel, name: str) -> None:
    """Raises `ModelError`, for the model called ``name``, when a parameter holds NaN or infinite values."""
    for path, parameter in model.named_parameters():
        # Smallest and largest carry NaN along, and need no copy of the tensor.
        if parameter.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(parameter.detach())):
            raise ModelError(
                f"model '{name}': parameter '{path}' holds NaN or infinite values; the checkpoint is damaged, or "
                f"{parameter.dtype} is too narrow for it"
            )
