"""What a job means for a model: which units may be cut, to which widths, and how much."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

from ..errors import SelectionError
from ..selection.base import Demand
from ..structure.plan import dense_units
from ..structure.scope import Scope
from ..structure.widths import NARROW, Widths, widths_for
from ..values import layer_numbers as numbers_of

if TYPE_CHECKING:
    from ..budgets.costs import Cost
    from ..loading.model import Structure
    from ..structure.coupling import CoupledGroup, CouplingGraph
    from ..structure.kept import Kept
    from .jobs import PruneJob


def scope_of(job: PruneJob, structure: Structure) -> Scope:
    """The kinds and layers that may be cut. By default, uniform widths are those of all layers; otherwise, and for the
    removal of whole layers, `inner_layers`."""
    count = structure.graph.num_layers
    chosen = numbers_of(job.layers, count)
    if chosen is not None:
        return Scope(job.kinds, chosen)
    inner = inner_layers(structure)
    return Scope(job.kinds, tuple(range(count)), inner) if job.shape == "uniform" else Scope(job.kinds, inner)


def inner_layers(structure: Structure) -> tuple[int, ...]:
    """All layers except the family's protected shares of the first and last ones."""
    count = structure.graph.num_layers
    first, last = (round(share * count) for share in structure.family.protected_layers)
    return tuple(range(first, count - last))


def widths_of(job: PruneJob, structure: Structure) -> Widths:
    """The widths that a job allows in this model."""
    config = structure.config.get_text_config(decoder=True)
    dense = dense_units(structure.plans, structure.graph)
    return widths_for(job.shape, job.round_to, int(getattr(config, "hidden_size", 0) or NARROW), dense)


def demand(
    job: PruneJob, whole: Cost, now: Cost, groups: Sequence[CoupledGroup], scope: Scope, step: int = 1
) -> Demand:
    """What must be removed in step number ``step``, so that ``step / job.steps`` of the amount is removed after it.

    ``whole``: the cost of the dense model; ``now``: of the model after earlier steps. Raises `SelectionError`.
    """
    if job.by == "units":
        units = {
            g.name: job.amount * (g.units if g.layer is not None else len(scope.allowed_units(g) or range(g.units)))
            for g in groups
        }
        return Demand(units=units)
    dense, steps = whole.remaining(), job.steps
    if job.by == "ratio":
        return Demand(amount=now.remaining() - round(dense * (1 - job.amount * (step / steps))), meet=job.meet)
    gone = dense - round(job.amount)
    if gone <= 0:
        raise SelectionError(f"--target-params {job.amount:,.0f} is not below the model's {dense:,} parameters")
    return Demand(amount=now.remaining() - (dense - ceil(gone * (step / steps))), meet=job.meet)


def part_of(graph: CouplingGraph, at_once: Kept, share: float, groups: Sequence[CoupledGroup]) -> Demand:
    """What ``groups``, as earlier steps left those of ``graph``, must lose so that ``share`` of what a cut to
    ``at_once`` removes is removed. No layers may go. Where steps took amounts, each could be less than a head, so that
    heads would never go."""
    units = {}
    for group in groups:
        dense = graph.by_name[group.name]
        wanted = dense.units - len(at_once.get(group.name, range(dense.units)))
        # Query heads that went with a key/value head are not part of what their own group loses.
        blocks = dense.blocks / group.blocks
        units[group.name] = (group.units * blocks - (dense.units - share * wanted)) / blocks
    return Demand(units=units)
