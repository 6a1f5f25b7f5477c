"""Scope: the kinds of groups and the decoder layers that may be cut."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..errors import SelectionError, UnknownNameError, UnsupportedModelError
from .coupling import ATTENTION, EXPERT, HIDDEN, LAYER, MLP, CoupledGroup, CouplingGraph


@dataclass(frozen=True, slots=True)
class Scope:
    """The kinds of groups and the numbers of the decoder layers that may be cut. ``removable``: of the layers that may
    be removed whole; None for all ``layers``."""

    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    removable: tuple[int, ...] | None = None

    def groups(self, graph: CouplingGraph) -> tuple[CoupledGroup, ...]:
        """The groups in scope. Raises `UnsupportedModelError` for a kind that discovery did not find, with the reason,
        and `UnknownNameError` for any other that the model does not have."""
        for kind in self.kinds:
            if kind not in graph.kinds:
                why = _why_not(graph, kind)
                if why:
                    raise UnsupportedModelError(
                        f"this model has no {kind} units that can be removed exactly "
                        f"(it has: {', '.join(graph.kinds) or 'none'}); discovery could not follow {why}"
                    )
                raise UnknownNameError("kind of group in this model:", kind, graph.kinds)
        inside = set(self.layers)
        found = tuple(g for g in graph.of_kinds(self.kinds) if g.layer is None or g.layer in inside)
        if not found:
            raise SelectionError("no coupled group is left to prune: select more with --kinds or --layers")
        return found

    def allowed_units(self, group: CoupledGroup) -> frozenset[int] | None:
        """The units of ``group`` that may be removed: for the group of decoder layers, the removable ones; else None:
        all."""
        if group.kind != LAYER:
            return None
        return frozenset(self.layers if self.removable is None else self.removable)


def _why_not(graph: CouplingGraph, kind: str) -> str:
    """The most frequent reason of blocked axes outside the decoder layers (for hidden channels) or inside them (for
    the other usual kinds), with the first such axis; for layers, the reason of their list. Empty when there is none."""
    if kind == LAYER:
        return next((f"{b.parameter}: {b.reason}" for b in graph.blocked if b.parameter == graph.layers), "")
    if kind not in (MLP, ATTENTION, HIDDEN, EXPERT):
        return ""
    blocked = [b for b in graph.blocked if graph.is_decoder(b.parameter) != (kind == HIDDEN) and " in " in b.reason]
    if not blocked:
        return ""
    reason, _ = Counter(b.reason for b in blocked).most_common(1)[0]
    first = next(b for b in blocked if b.reason == reason)
    return f"{first.parameter} axis {first.axis}: {reason}"
