"""The budget of multiply-accumulate operations per token. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import Field

from ...component import ComponentSettings
from ...structure.coupling import ATTENTION, CoupledGroup, CouplingGraph, Role
from .base import Budget, BudgetSubject
from .costs import Cost
from .sizes import SizeModel


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


class Macs(Budget):
    """Multiply-accumulate operations to decode one token while ``context`` tokens are in the cache."""

    name = "macs"
    summary = "multiply-accumulate operations per decoded token"
    from_shapes = True

    class Settings(ComponentSettings):
        context: int = Field(512, ge=1, description="Tokens in the key/value cache.")

    settings: Settings

    def cost(self, subject: BudgetSubject, measured: Mapping[str, Any] | None) -> MacsCost:
        del measured
        from ...models.meta import multiplied

        routed = {name: experts for name, _, experts in multiplied(subject.model)}
        return MacsCost(subject.graph, subject.groups, routed, self.settings.context)
