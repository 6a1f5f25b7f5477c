"""Trials: the divergence of the model after a cut from the current model.

Every trial cuts a copy that shares the weights that are not cut. Weights that read removed units are fitted again in
the trial, each from the Gram matrix of its inputs in the uncut model. This fit is simpler than the compensation's, but
distinguishes cuts that a fit can compensate from others.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...calibration.calibration import CalibrationSet
from ...discovery.rules import with_rules
from ...engine.execution import Execution
from ...engine.statistics import divergence, input_statistics
from ...engine.walk import check_tokens
from ...errors import ModelError
from ...models.numbers import with_fast_products
from ...models.surgery import cut_copy
from ...progress import Progress
from ...structure.coupling import CoupledGroup, CouplingGraph
from .consumers import Consumer, consumers_of
from .gram_fit import fitted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...structure.architecture import Follows
    from ...structure.kept import Kept

TRIED, _FITTED = 2048, 16384
"""Number of tokens for the divergence, and maximum number of other tokens for the fit."""


class Trials:
    """Measures cuts of ``groups``; with ``refit``, after fitting weights again. Memory beyond the model: the logits of
    2,048 tokens and, with ``refit``, a Gram matrix (in, in) in float32 for every weight that reads the units."""

    def __init__(
        self,
        model: PreTrainedModel,
        graph: CouplingGraph,
        groups: Sequence[CoupledGroup],
        family: Follows,
        calibration: CalibrationSet,
        *,
        refit: bool,
        progress: Progress,
    ) -> None:
        self.model, self.graph = model, graph
        self.family = with_rules(family, model, {group.kind for group in groups})
        ids = check_tokens(model, calibration.input_ids)
        rows = max(1, min(TRIED // ids.shape[1], len(ids) // 2))
        self.tried = torch.split(ids[-rows:], max(1, TRIED // 4 // ids.shape[1]))
        self.dense = [self._logits(model, part) for part in self.tried]
        self._fitted: dict[str, list[tuple[bytes, nn.Parameter]]] = {}
        self._grams = self._measure(groups, ids[: -rows or None], calibration.source, progress) if refit else {}

    def _measure(
        self, groups: Sequence[CoupledGroup], ids: torch.Tensor, source: str, progress: Progress
    ) -> dict[str, torch.Tensor]:
        """Parameter → mean outer product of its inputs (in, in), for the weights that read units inside layers."""
        emptied = {g.name: tuple(range(max(g.minimum, 1))) for g in groups if g.layer is not None and not g.modules}
        layers = range(self.graph.num_layers)
        wanted = [name for layer in layers for name in self._consumers(emptied, layer)]
        if not wanted or not len(ids):
            return {}
        part = CalibrationSet(ids, source).first(_FITTED)
        measured = input_statistics(Execution.of(self.model, self.graph.layers), wanted, part, progress, gram=True)
        return {name: found.gram for layer in measured for name, found in layer.items() if found.gram is not None}

    def _consumers(self, kept: Kept, layer: int) -> dict[str, Consumer]:
        found = consumers_of(self.graph, kept, layer)
        return {name: consumer for name, consumer in found.items() if not consumer.from_stream}

    @torch.no_grad()
    def loss(self, kept: Kept) -> float:
        """Mean KL divergence per token, in nats, of the model cut to ``kept`` from the current model. Raises
        `ModelError` where it is not finite, as no allocation could compare it."""
        layers = {self.graph.by_name[name].layer for name in kept}
        weights = {
            name: self._fit(consumer)
            for layer in layers
            if layer is not None
            for name, consumer in self._consumers(kept, layer).items()
            if name in self._grams
        }
        copied = cut_copy(self.model, self.graph, kept, self.family, weights)
        pairs = zip(self.dense, self.tried, strict=True)
        total = sum(divergence(wanted, self._logits(copied, ids)) for wanted, ids in pairs)
        if not isfinite(total):
            raise ModelError(
                "the divergence of a trial cut is not a finite number; the weights are damaged, or activations "
                f"overflow in {str(self.model.dtype).removeprefix('torch.')}"
            )
        return total / sum(ids[:, 1:].numel() for ids in self.tried)

    @torch.no_grad()
    def _logits(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = with_fast_products(model, lambda: model(input_ids=ids, use_cache=False).logits)
        return found

    def _fit(self, consumer: Consumer) -> nn.Parameter:
        """The parameter as `fitted` gives it."""
        key = consumer.kept.numpy().tobytes()
        known = self._fitted.setdefault(consumer.parameter, [])
        for had, weight in known:
            if had == key:
                return weight
        old = self.model.get_parameter(consumer.parameter)
        new = nn.Parameter(fitted(old, consumer, self._grams[consumer.parameter]), requires_grad=False)
        # A search compares the current selection with one other at a time, so older fits are not needed again.
        known[:] = [*known[-1:], (key, new)]
        return new
