"""Running a decoder layer by layer over the examples of a training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..engine.boundaries import DEFAULT_LIMIT
from ..engine.execution import Execution
from ..engine.walk import ForwardWalk
from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from ..models.weights import Weights
    from .base import RecoveryJob


def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """int64 (rows, tokens), with ``value`` after the end of shorter rows: decoders look only at earlier tokens, so
    padding on the right changes nothing before it."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def walk_over(
    job: RecoveryJob, weights: Weights, batches: Sequence[torch.Tensor], *, streams: int, otherwise: str
) -> ForwardWalk:
    """A walk over micro-batches of `padded` token ids. ``streams``: how many sequences of hidden states share the
    memory for them. Raises `UnsupportedModelError` for decoders whose layers cannot be run one by one; ``otherwise``:
    what to do then."""
    limit = job.walk.boundary_memory
    limit = (DEFAULT_LIMIT if limit is None else limit) // streams
    try:
        return ForwardWalk.over_batches(Execution(weights, limit), batches)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"the layers of {type(weights.model).__name__} pass other values than hidden states to one another, so "
            f"they cannot be run one by one; {otherwise}"
        ) from error
