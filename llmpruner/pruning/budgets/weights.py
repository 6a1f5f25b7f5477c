"""Budgets of weights: parameters of the decoder, all parameters, and bytes. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ...structure.coupling import CoupledGroup, CouplingGraph
from .base import Budget, BudgetSubject
from .costs import Cost
from .sizes import SizeModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WeightCost(Cost):
    """Σ weights[p] · elements(p) over parameters p, with elements(p) the number of remaining elements, and weights[p] 1
    to count parameters or the bytes of an element to count bytes."""

    def __init__(
        self, sizes: SizeModel, weights: Mapping[str, int], label: str = "parameters", unit: str = "parameters"
    ) -> None:
        self.label, self.unit = label, unit
        self._sizes, self._weights = sizes, weights

    def remaining(self, kept: Mapping[str, int] | None = None, gone: Collection[int] = ()) -> int:
        kept, sizes = kept or {}, self._sizes
        return sum(
            weight * sizes.elements(name, kept)
            for name, weight in self._weights.items()
            if sizes.layer_of[name] not in gone
        )


def parameter_cost(graph: CouplingGraph, groups: Collection[CoupledGroup], *, decoder: bool) -> WeightCost:
    """Parameters of the decoder's layers (``decoder``), or of the whole model; tied ones count once."""
    names = {n: 1 for n in graph.shapes if n not in graph.ties and (graph.is_decoder(n) or not decoder)}
    return WeightCost(SizeModel(graph, groups), names, "decoder parameters" if decoder else "parameters")


def byte_cost(model: PreTrainedModel, graph: CouplingGraph, groups: Collection[CoupledGroup]) -> WeightCost:
    """Bytes of all weights of ``model`` in the dtypes that they have in memory; tied ones count once."""
    weights = {name: parameter.element_size() for name, parameter in model.named_parameters()}
    return WeightCost(SizeModel(graph, groups), weights, "weights", "bytes")


class DecoderParameters(Budget):
    """Parameters of the decoder's layers, without embeddings, final norm and head."""

    name = "decoder"
    summary = "parameters of the decoder's layers"
    from_shapes = True

    def cost(self, subject: BudgetSubject, measured: Mapping[str, Any] | None) -> WeightCost:
        del measured
        return parameter_cost(subject.graph, subject.groups, decoder=True)


class AllParameters(Budget):
    """All parameters; tied ones count once."""

    name = "parameters"
    summary = "all parameters"
    from_shapes = True

    def cost(self, subject: BudgetSubject, measured: Mapping[str, Any] | None) -> WeightCost:
        del measured
        return parameter_cost(subject.graph, subject.groups, decoder=False)


class WeightBytes(Budget):
    """Bytes of all weights in the dtypes that they have in memory; tied ones count once."""

    name = "bytes"
    summary = "bytes of all weights, in the dtypes that they are loaded in"
    from_shapes = True

    def cost(self, subject: BudgetSubject, measured: Mapping[str, Any] | None) -> WeightCost:
        del measured
        return byte_cost(subject.model, subject.graph, subject.groups)
