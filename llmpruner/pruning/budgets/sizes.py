"""The built-in budgets, and what they count: sizes of parameters as a function of how many units groups keep.

`SizeModel` has the sizes; `WeightCost` (parameters, bytes) and `MacsCost` are sums of them. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from pydantic import Field

from ...component import ComponentSettings
from ...structure.coupling import ATTENTION, CoupledGroup, CouplingGraph, Role
from .base import Budget, BudgetSubject, Cost

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SizeModel:
    """Sizes of every parameter of a graph, tied ones included, as a function of the number of units kept per group.

    ``kept``, in all methods: group name → number of units kept, as if no other group lost any; missing groups keep
    all. Exact for groups that own disjoint indices of an axis, and for a group whose units are nested in another's with
    equal numbers per block (query heads in KV heads); groups do not overlap otherwise.
    """

    def __init__(self, graph: CouplingGraph, groups: Collection[CoupledGroup]) -> None:
        owners: dict[tuple[str, int], list[CoupledGroup]] = {}
        for group in groups:
            for key in dict.fromkeys((s.parameter, s.axis) for s in group.spans):
                owners.setdefault(key, []).append(group)
        self._axes = {
            name: [_Axis(name, a, size, owners.get((name, a), [])) for a, size in enumerate(shape)]
            for name, shape in graph.shapes.items()
        }
        self.layer_of = {name: graph.layer_of(name) for name in graph.shapes}
        """Parameter → number of its decoder layer, None outside the decoder layers."""

    def elements(self, name: str, kept: Mapping[str, int]) -> int:
        """Number of remaining elements of parameter ``name``."""
        return prod(axis.size(kept) for axis in self._axes[name])

    def size(self, name: str, axis: int, kept: Mapping[str, int]) -> int:
        """Remaining size of one axis of parameter ``name``."""
        return self._axes[name][axis].size(kept)

    def owned(self, name: str, axis: int, group: CoupledGroup, kept: Mapping[str, int]) -> int:
        """Number of remaining indices of one axis among those that ``group`` owns."""
        return self._axes[name][axis].owned(group, kept)


class _Axis:
    """One axis of one parameter. ``_parts``: numbers of indices that the same groups own, and these groups. In a fused
    matrix, key/value heads own all rows and query heads some of them; the others stay when query heads go."""

    def __init__(self, parameter: str, axis: int, size: int, groups: Sequence[CoupledGroup]) -> None:
        self._size = size
        owned = [_owned(group, parameter, axis) for group in groups]
        owners = Counter(tuple(n for n, of in enumerate(owned) if index in of) for index in set().union(*owned))
        self._parts = [(count, [groups[n] for n in numbers]) for numbers, count in owners.items()]

    def size(self, kept: Mapping[str, int]) -> int:
        return self._size - sum(count - _stay(count, owners, kept) for count, owners in self._parts)

    def owned(self, group: CoupledGroup, kept: Mapping[str, int]) -> int:
        return sum(_stay(count, owners, kept) for count, owners in self._parts if group in owners)


def _stay(count: int, owners: Iterable[CoupledGroup], kept: Mapping[str, int]) -> int:
    for group in owners:
        count = count * kept.get(group.name, group.units) // group.units
    return count


def _owned(group: CoupledGroup, parameter: str, axis: int) -> set[int]:
    spans = (s for s in group.spans if s.parameter == parameter and s.axis == axis)
    return {i for span in spans for i in span.indices(range(group.units))}


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


class MacsCost(Cost):
    """Multiply-accumulate operations (MACs) to decode one token, exactly as `llmpruner.models.meta` counts them:

        Σ elements(p) · share of p's experts that a token is routed to  +  2 · context · Σ attention channels

    over the parameters p of linear layers in the remaining layers.

    ``multiplied``: parameter → how many of the experts stacked in it a token is routed to; None without experts.
    """

    label, unit = "MACs per token", "MACs per token"

    def __init__(
        self,
        graph: CouplingGraph,
        groups: Collection[CoupledGroup],
        multiplied: Mapping[str, int | None],
        context: int,
    ) -> None:
        attention = graph.of_kinds([ATTENTION])
        self._sizes = SizeModel(graph, {g.name: g for g in (*groups, *attention)}.values())
        self._multiplied, self._context = multiplied, context
        self._reads = [
            (group, *key)
            for group in attention
            for key in dict.fromkeys((s.parameter, s.axis) for s in group.spans_with(Role.CONSUMES))
        ]

    def remaining(self, kept: Mapping[str, int] | None = None, gone: Collection[int] = ()) -> int:
        kept, sizes = kept or {}, self._sizes
        weights = 0
        for name, routed in self._multiplied.items():
            if sizes.layer_of[name] in gone:
                continue
            count = sizes.elements(name, kept)
            weights += count if routed is None else count // sizes.size(name, 0, kept) * routed
        width = sum(sizes.owned(name, axis, g, kept) for g, name, axis in self._reads if g.layer not in gone)
        return weights + 2 * self._context * width


class DecoderParameters(Budget):
    """Parameters of the decoder's layers, without embeddings, final norm and head."""

    name = "decoder"
    summary = "parameters of the decoder's layers"
    from_shapes = True

    def cost(self, subject: BudgetSubject) -> WeightCost:
        return parameter_cost(subject.graph, subject.groups, decoder=True)


class AllParameters(Budget):
    """All parameters; tied ones count once."""

    name = "parameters"
    summary = "all parameters"
    from_shapes = True

    def cost(self, subject: BudgetSubject) -> WeightCost:
        return parameter_cost(subject.graph, subject.groups, decoder=False)


class WeightBytes(Budget):
    """Bytes of all weights in the dtypes that they have in memory; tied ones count once."""

    name = "bytes"
    summary = "bytes of all weights, in the dtypes that they are loaded in"
    from_shapes = True

    def cost(self, subject: BudgetSubject) -> WeightCost:
        return byte_cost(subject.model, subject.graph, subject.groups)


class Macs(Budget):
    """Multiply-accumulate operations to decode one token while ``context`` tokens are in the cache."""

    name = "macs"
    summary = "multiply-accumulate operations per decoded token"
    from_shapes = True

    class Settings(ComponentSettings):
        context: int = Field(512, ge=1, description="Tokens in the key/value cache.")

    settings: Settings

    def cost(self, subject: BudgetSubject) -> MacsCost:
        from ...models.meta import multiplied

        routed = {name: experts for name, _, experts in multiplied(subject.model)}
        return MacsCost(subject.graph, subject.groups, routed, self.settings.context)


class KvCache(Budget):
    """Bytes that the key/value cache grows by with every token, counted in the caches of the whole model and of models
    with units of each group removed."""

    name = "kv-cache"
    summary = "bytes of key/value cache per token"

    def cost(self, subject: BudgetSubject) -> Cost:
        from .kv_cache import measure_cache

        return measure_cache(subject)
