"""Trial cuts: how far the predictions of a cut model are from those of the current one, for `Sensitivity`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import isfinite
from typing import TYPE_CHECKING

import torch

from ..calibration.calibration import CalibrationSet
from ..discovery.verify import with_rules
from ..engine.statistics import divergence
from ..engine.walk import check_tokens
from ..errors import ModelError
from ..models.numbers import with_fast_products
from ..models.surgery import cut_copy
from ..structure.coupling import CouplingGraph

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.kept import Follows, Kept

TRIED = 2048
"""Number of tokens that predictions are compared on."""


@torch.no_grad()
def trial_loss(
    model: PreTrainedModel, graph: CouplingGraph, kinds: Collection[str], family: Follows, calibration: CalibrationSet
) -> Callable[[Kept], float]:
    """A function from kept units to the mean KL divergence per token, in nats, of the model cut to them from ``model``.

    ``kinds``: of the units that are cut. Every trial cuts a copy that shares the weights that are not cut. Memory
    beyond the model: the logits of 2,048 tokens.
    """
    family = with_rules(family, model, set(kinds))
    ids = check_tokens(model, calibration.input_ids)
    rows = max(1, min(TRIED // ids.shape[1], len(ids) // 2))
    tried = torch.split(ids[-rows:], max(1, TRIED // 4 // ids.shape[1]))
    dense = [_logits(model, part) for part in tried]

    @torch.no_grad()
    def loss(kept: Kept) -> float:
        copied = cut_copy(model, graph, kept, family)
        total = sum(divergence(wanted, _logits(copied, part)) for wanted, part in zip(dense, tried, strict=True))
        if not isfinite(total):
            raise ModelError(
                "the divergence of a trial cut is not a finite number; the weights are damaged, or activations "
                f"overflow in {str(model.dtype).removeprefix('torch.')}"
            )
        return total / sum(part[:, 1:].numel() for part in tried)

    return loss


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = with_fast_products(model, lambda: model(input_ids=ids, use_cache=False).logits)
    return logits
