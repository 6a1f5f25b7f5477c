"""The least-squares fit of a weight from the Gram matrix of its inputs in the uncut model alone: less exact than the
compensation's, but it takes no run of the pruned model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .consumers import Consumer

_RIDGE = 0.03
"""λ as a share of the mean diagonal of the Gram matrix."""
_LEAST = 1e-20
"""The least λ: with a Gram matrix of zeros (an expert without tokens) any λ leaves the weights as they are."""


def fitted(parameter: torch.Tensor, consumer: Consumer, gram: torch.Tensor) -> torch.Tensor:
    """The parameter with zeros for removed inputs and, for the kept ones K, the least-squares fit of its outputs on all
    inputs: (W G + λ W)_K (G_KK + λ I)⁻¹, with G = ``gram`` (…, in, in) the Gram matrix of all inputs, float32; that of
    each expert for a stacked parameter. Of the shape and dtype of ``parameter``."""
    kept = consumer.kept.to(parameter.device)
    old_OI = parameter.float() if consumer.axis == parameter.dim() - 1 else parameter.float().mT
    inner = gram.index_select(-1, kept).index_select(-2, kept)
    strength = (_RIDGE * inner.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)).clamp_min(_LEAST)
    inner.diagonal(dim1=-2, dim2=-1).add_(strength)
    cross_IO = gram.index_select(-2, kept) @ old_OI.mT + strength[..., None] * old_OI.index_select(-1, kept).mT
    new_OI = torch.zeros_like(old_OI)
    new_OI.index_copy_(-1, kept, torch.cholesky_solve(cross_IO, torch.linalg.cholesky(inner)).mT.contiguous())
    new = new_OI if consumer.axis == parameter.dim() - 1 else new_OI.mT
    return new.to(parameter.dtype).contiguous()
