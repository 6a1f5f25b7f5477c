"""The place of a parameter in the model, which criteria are given instead of its name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..structure.coupling import Role

if TYPE_CHECKING:
    from ..structure.coupling import CouplingGraph


@dataclass(frozen=True, slots=True)
class Position:
    """The place of a parameter in the model.

    ``reads`` and ``produces`` hold kinds of units, of all coupled groups of the model, whether they are scored or not;
    a width that no coupled group covers is missing. A down projection reads ``"mlp"`` and produces ``"hidden"``.
    """

    layer: int | None = None
    """Number of its decoder layer, from 0; None outside the decoder layers (embeddings, final norm, head)."""
    reads: frozenset[str] = frozenset()
    """Kinds of the units whose activations the parameter is multiplied with (spans with `Role.CONSUMES`)."""
    produces: frozenset[str] = frozenset()
    """Kinds of the units whose activations it computes (spans with `Role.PRODUCES`)."""


@dataclass(frozen=True, slots=True)
class UnitAxis:
    """One axis of a parameter along which the units of a coupled group lie."""

    kind: str
    """Kind of the units: ``"mlp"``, ``"attention"``, ``"hidden"``, ``"expert"``, ``"layer"`` …"""
    role: Role | None
    """Role of the span; None where a unit is a whole layer and so owns the whole parameter."""
    axis: int
    """The axis of the parameter; 0 where a unit owns the whole parameter."""
    position: Position


def positions(graph: CouplingGraph) -> dict[str, Position]:
    """The position of every stored parameter of the model (of tied ones, under the name they are stored by)."""
    reads: dict[str, set[str]] = {}
    produces: dict[str, set[str]] = {}
    for group in graph.groups:
        for span in group.spans_with(Role.CONSUMES, Role.PRODUCES):
            kinds = reads if span.role is Role.CONSUMES else produces
            kinds.setdefault(graph.ties.get(span.parameter, span.parameter), set()).add(group.kind)
    return {
        name: Position(_layer(graph, name), frozenset(reads.get(name, ())), frozenset(produces.get(name, ())))
        for name in graph.shapes
        if name not in graph.ties
    }


def _layer(graph: CouplingGraph, name: str) -> int | None:
    return int(name[len(graph.layers) + 1 :].split(".", maxsplit=1)[0]) if graph.is_decoder(name) else None
