"""What may be cut: kinds of groups and decoder layers."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SelectionError, UnknownNameError
from .coupling import LAYER, CoupledGroup, CouplingGraph


@dataclass(frozen=True, slots=True)
class Scope:
    """What may be cut: kinds of groups, and decoder layers (numbers in the graph at hand)."""

    kinds: tuple[str, ...]
    layers: tuple[int, ...]

    def groups(self, graph: CouplingGraph) -> tuple[CoupledGroup, ...]:
        """The groups in scope. Raises `UnknownNameError` for a kind that the model does not have."""
        for kind in self.kinds:
            if kind not in graph.kinds:
                raise UnknownNameError("kind of group in this model:", kind, graph.kinds)
        inside = set(self.layers)
        found = tuple(g for g in graph.of_kinds(self.kinds) if g.layer is None or g.layer in inside)
        if not found:
            raise SelectionError("no coupled group is left to prune: select more with --kinds or --layers")
        return found

    def allowed_units(self, group: CoupledGroup) -> frozenset[int] | None:
        return frozenset(self.layers) if group.kind == LAYER else None
