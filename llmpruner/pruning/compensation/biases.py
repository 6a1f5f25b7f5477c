"""Weights that have no bias to change. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import UnsupportedModelError
from ...structure.coupling import Role

if TYPE_CHECKING:
    from ...structure.coupling import CoupledGroup, CouplingGraph

_WEIGHT = ".weight"


def no_bias(parameter: str) -> UnsupportedModelError:
    """The error for a weight that has none."""
    return UnsupportedModelError(f"'{parameter}' has no bias to compensate with; use --compensate refit or none")


def check_biases(graph: CouplingGraph, groups: Sequence[CoupledGroup]) -> None:
    """Raise `UnsupportedModelError` where a matrix of a layer that reads units of ``groups`` has no bias beside it. How
    biases of stacked matrices are called differs between models; those are not looked at."""
    for group in groups:
        for span in group.spans_with(Role.CONSUMES):
            name = span.parameter
            plain = name.endswith(_WEIGHT) and len(graph.shapes[name]) == 2 and name.startswith(f"{graph.layers}.")
            if plain and f"{name.removesuffix(_WEIGHT)}.bias" not in graph.shapes:
                raise no_bias(name)
