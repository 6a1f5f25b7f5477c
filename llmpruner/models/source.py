"""TensorSource: the weights of a checkpoint by the names of the model's own parameters, read when they are needed."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class TensorSource(Protocol):
    """Where a model that is read layer by layer has its weights. It holds no values between two calls."""

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Parameter → value, on the CPU, with the shape and dtype that it has in the model.

        ``names``: parameters of one decoder layer, or parameters outside the layers, without those that are tied to
        another one. Values may be mapped from a file that is mapped anew for each call, as its pages count as memory of
        the process for as long as the mapping exists. Changes in place do not reach the files. Calls do not overlap,
        but come from several threads. Raises `CheckpointError` for a file that is damaged or gone.
        """
        ...
