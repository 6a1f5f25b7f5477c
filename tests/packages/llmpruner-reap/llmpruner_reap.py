"""REAP: router-weighted expert activation pruning (Lasby et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmpruner import (
    MLP,
    ImportanceCriterion,
    ParameterSignals,
    Product,
    Signal,
    UnitAxis,
    UnsupportedModelError,
    hookimpl,
)


class Reap(ImportanceCriterion):
    """Mean, over the tokens routed to an expert, of the router's weight times the L2 norm of the expert's output."""

    name = "reap"
    summary = "for experts: mean of router weight × norm of the expert's output over its tokens (REAP)"
    needs = frozenset({Signal.WEIGHT, Signal.PRODUCT})
    kinds = frozenset({"expert"})

    def counts(self, axis: UnitAxis) -> bool:
        """Of all that belongs to an expert, the projection that reads its inner units: it computes the output."""
        return MLP in axis.position.reads

    def measure(self, product: Product) -> Mapping[str, torch.Tensor]:
        if product.expert is None or MLP not in product.position.reads:
            return {}
        norms = product.outputs.norm(dim=1)
        return {"norms": (product.gates * norms).sum(), "tokens": torch.ones_like(norms).sum()}

    def score_units(self, signals: ParameterSignals, axis: UnitAxis, index_UK: torch.Tensor) -> torch.Tensor:
        del axis
        sums = signals.products.sums if signals.products else {}
        if not sums:
            raise UnsupportedModelError("reap cannot tell which weights compute the outputs of this model's experts")
        means = sums["norms"] / sums["tokens"].clamp_min(1)
        return means[index_UK].sum(1)


@hookimpl
def llmpruner_importance_criteria() -> list[type[ImportanceCriterion]]:
    return [Reap]
