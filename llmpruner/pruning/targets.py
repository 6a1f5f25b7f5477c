"""Resolve a job against a model: eligible units, target widths, amount."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from ..errors import SelectionError
from ..models.model import Model, Structure
from ..models.vocabulary import removable_tokens
from ..structure.coupling import VOCABULARY, CoupledGroup, CouplingGraph
from ..structure.kept import Kept, removed_layers, renamed
from ..structure.plan import dense_units
from ..structure.scope import Scope
from ..structure.widths import NARROW, Widths, like, widths_for
from ..values import chosen_layers
from .budgets import Cost
from .job import PruneJob


@dataclass(frozen=True)
class Demand:
    """What must be removed: an ``amount`` of a cost, and the ``whole``, as in `AllocationTask`; or ``units``: group
    name → number of units, which need not be whole."""

    amount: int = 0
    whole: int | None = None
    units: Mapping[str, float] | None = None


def scope_of(job: PruneJob, structure: Structure) -> Scope:
    """The kinds and layers that may be cut. By default, uniform widths are those of all layers; otherwise, and for the
    removal of whole layers, a tenth of the layers at either end stays."""
    count = structure.graph.num_layers
    chosen = chosen_layers(job.layers, count)
    tokens = None
    if VOCABULARY in job.kinds and isinstance(structure, Model):
        tokens = removable_tokens(structure.model, structure.tokenizer)
    if chosen is not None:
        return Scope(job.kinds, chosen, tokens=tokens)
    ends = round(0.1 * count)  # LLM-Pruner protects layers 0–3 and 30–31 of LLaMA-7B's 32
    inner = tuple(range(ends, count - ends))
    return Scope(job.kinds, tuple(range(count)) if job.shape == "uniform" else inner, inner, tokens)


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
    if job.by == "tokens":
        (group,) = groups
        gone = group.units - round(job.amount)
        most = len(scope.allowed_units(group) or range(group.units))
        if not 0 < gone <= most:
            raise SelectionError(
                f"vocabulary.tokens={job.amount:.0f}: the model has {group.units:,} tokens, of which "
                f"{group.units - most:,} must stay (special tokens, bytes and single characters)"
            )
        return Demand(units={group.name: float(gone)})
    if job.by == "units":
        return Demand(units={g.name: job.amount * len(scope.allowed_units(g) or range(g.units)) for g in groups})
    dense, left = whole.remaining(), now.remaining()
    if job.by == "ratio":
        after = [dense - round(dense * job.amount * (n / job.steps)) for n in (step, job.steps)]
    else:
        gone = dense - round(job.amount)
        if gone <= 0:
            raise SelectionError(f"prune.target_params {job.amount:,.0f} is not below the model's {dense:,} parameters")
        after = [dense - ceil(gone * (n / job.steps)) for n in (step, job.steps)]
    return Demand(amount=left - after[0], whole=None if step == job.steps else left - after[1])


def lost(graph: CouplingGraph, groups: Sequence[CoupledGroup], kept: Kept) -> dict[str, float]:
    """Group name → how many units it loses by a cut to ``kept``: of a group in a layer that goes, as many as equal
    groups of other layers lose on average, or others of its kind."""
    gone = removed_layers(graph, kept)
    stay = [group for group in groups if group.layer not in gone]
    found: dict[str, float] = {g.name: g.units - len(kept.get(g.name, range(g.units))) for g in stay}
    for group in groups:
        if group.name not in found:
            peers = [g for g in stay if like(g) == like(group)] or [g for g in stay if g.kind == group.kind]
            share = sum(found[g.name] for g in peers) / max(sum(g.units for g in peers), 1)
            found[group.name] = group.units * share
    return found


def part_of(
    graph: CouplingGraph, cut: Kept, wanted: Mapping[str, float], share: float, groups: Sequence[CoupledGroup]
) -> Demand:
    """What ``groups``, as earlier steps left those of ``graph`` by ``cut``, must lose so that ``share`` of the
    ``wanted`` units (of all groups of ``graph``, as `lost` gives them) is removed. Where steps took amounts, each could
    be less than a head or a layer, so that heads and layers would never go."""
    before = {new: old for old, new in renamed(graph, cut).items()}
    units = {}
    for group in groups:
        dense = graph.by_name[before[group.name]]
        # Query heads that went with a key/value head are not part of what their own group loses.
        blocks = dense.blocks / group.blocks
        units[group.name] = (group.units * blocks - (dense.units - share * wanted[dense.name])) / blocks
    return Demand(units=units)
