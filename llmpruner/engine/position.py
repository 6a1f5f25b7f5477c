"""The position of a parameter in the model, which criteria get instead of its name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..structure.coupling import Role

if TYPE_CHECKING:
    from ..structure.coupling import CouplingGraph


@dataclass(frozen=True, slots=True)
class Position:
    """The position of a parameter in the model.

    ``reads`` and ``produces`` contain the kinds of units of all coupled groups, whether they are scored or not; an axis
    that no coupled group owns is not represented. A down projection reads ``"mlp"`` and produces ``"hidden"``.
    """

    layer: int | None = None
    """Number of its decoder layer, from 0; None outside the decoder layers (embeddings, final norm, head)."""
    reads: frozenset[str] = frozenset()
    """Kinds of the units whose activations the parameter is multiplied with (spans with `Role.CONSUMES`)."""
    produces: frozenset[str] = frozenset()
    """Kinds of the units whose activations it computes (spans with `Role.PRODUCES`)."""


@dataclass(frozen=True, slots=True)
class UnitAxis:
    """One axis of a parameter whose indices belong to the units of a coupled group."""

    kind: str
    """Kind of the units: ``"mlp"``, ``"attention"``, ``"hidden"``, ``"expert"``, ``"layer"`` …"""
    role: Role | None
    """Role of the span; None where a unit is a layer, which owns the whole parameter."""
    axis: int
    """The axis of the parameter; 0 where a unit is a layer."""
    position: Position


def positions(graph: CouplingGraph) -> dict[str, Position]:
    """Name → position of every stored parameter; tied parameters are under the name they are stored by."""
    reads: dict[str, set[str]] = {}
    produces: dict[str, set[str]] = {}
    for group in graph.groups:
        for span in group.spans_with(Role.CONSUMES, Role.PRODUCES):
            kinds = reads if span.role is Role.CONSUMES else produces
            kinds.setdefault(graph.ties.get(span.parameter, span.parameter), set()).add(group.kind)
    return {
        name: Position(graph.layer_of(name), frozenset(reads.get(name, ())), frozenset(produces.get(name, ())))
        for name in graph.shapes
        if name not in graph.ties
    }
