"""Applying a plan to a model: one cut per parameter (or buffer) and axis, and its exact mirror image, silencing.

``kept`` maps group names to the units that stay; a group that is not named keeps everything. All functions change
the model in place and work on the meta device too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .coupling import CoupledGroup, CouplingGraph, Role, Span, index_map
from .errors import PlanError
from .modeling_llmpruner import drop_layers, follow_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .families import ModelFamily

Kept = Mapping[str, Sequence[int]]

_EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")


def cut(model: PreTrainedModel, graph: CouplingGraph, kept: Kept, family: ModelFamily | None = None) -> CouplingGraph:
    """Remove every unit that ``kept`` leaves out, and return the coupling graph of what remains.

    Parameters (also where they are tied) and buffers are replaced, sizes stored by linear, embedding and norm
    modules follow, RMS norms over cut units are rescaled so that the result equals the silenced model, removed
    layers are deleted and the rest renumbered; then ``family.follow`` sets what else must follow.
    """
    check_kept(graph, kept)
    for group in graph.groups:
        if group.name in kept:
            _rescale_norms(model, group, len(kept[group.name]))
    axes = kept_indices(graph, kept)
    replaced: dict[int, torch.Tensor] = {}
    for name in (*graph.shapes, *graph.buffers):
        cuts = {axis: index for (parameter, axis), index in axes.items() if parameter == name}
        if cuts:
            _replace(model, name, cuts, replaced)
    _drop_layers(model, graph, kept)
    remaining = restrict(graph, kept)
    if family is not None:
        family.follow(model, graph, kept)
    return remaining


def silence(model: PreTrainedModel, graph: CouplingGraph, kept: Kept) -> None:
    """Set to zero what the removed units contribute, and change no shape: the reference that a cut must equal.

    Units are silenced where they are consumed; units with a norm over them where they are produced. A layer
    cannot be silenced by zeros in general; groups of modules are refused with `PlanError`.
    """
    check_kept(graph, kept)
    for name, units in kept.items():
        group = graph.by_name[name]
        if group.modules:
            raise PlanError(f"group '{name}' consists of whole modules, which cannot be silenced by zeros")
        removed = sorted(set(range(group.units)) - set(units))
        role = Role.PRODUCES if group.is_normalized else Role.CONSUMES
        for span in group.cut_spans:
            if span.role is not role:
                continue
            tensor = _tensor(model, span.parameter)
            index = torch.tensor(span.indices(removed), dtype=torch.long, device=tensor.device)
            with torch.no_grad():
                tensor.index_fill_(span.axis, index, 0.0)


def check_kept(graph: CouplingGraph, kept: Kept) -> None:
    """Raise `PlanError` unless ``kept`` names known groups, known units, and obeys every group's constraints."""
    for name, units in kept.items():
        group = graph.by_name.get(name)
        if group is None:
            raise PlanError(f"the plan cuts group '{name}', which this model does not have")
        if list(units) != sorted(set(units)) or (units and not 0 <= units[0] <= units[-1] < group.units):
            raise PlanError(f"group '{name}': kept units must be increasing and within 0…{group.units - 1}")
        if len(units) < group.minimum:
            raise PlanError(f"group '{name}' must keep at least {group.minimum} units, the plan keeps {len(units)}")
        if group.blocks > 1:
            per_block = group.units // group.blocks
            counts = [0] * group.blocks
            for unit in units:
                counts[unit // per_block] += 1
            if len(set(counts)) > 1:
                raise PlanError(
                    f"group '{name}' must keep the same number of units in each of its {group.blocks} blocks"
                )


def kept_indices(graph: CouplingGraph, kept: Kept) -> dict[tuple[str, int], list[int]]:
    """(parameter or buffer, axis) → the sorted indices that stay, over all groups that cut this axis together."""
    removed: dict[tuple[str, int], set[int]] = {}
    for name, units in kept.items():
        group = graph.by_name[name]
        gone = sorted(set(range(group.units)) - set(units))
        for span in group.cut_spans:
            removed.setdefault((span.parameter, span.axis), set()).update(span.indices(gone))
    return {
        (name, axis): [i for i in range((graph.shapes.get(name) or graph.buffers[name])[axis]) if i not in gone]
        for (name, axis), gone in removed.items()
        if gone
    }


def removed_modules(graph: CouplingGraph, kept: Kept) -> list[str]:
    """Paths of whole modules that the plan removes."""
    return [
        module
        for name, units in kept.items()
        for unit, module in enumerate(graph.by_name[name].modules)
        if unit not in set(units)
    ]


def restrict(graph: CouplingGraph, kept: Kept) -> CouplingGraph:
    """The coupling graph of the cut model: shapes, index maps, and layer numbers follow the cut."""
    axes = kept_indices(graph, kept)
    moved = _module_moves(graph, kept)
    names = renamed(graph, kept)
    numbers = layer_numbers(graph, kept)
    groups = []
    for group in graph.groups:
        if group.name not in names:
            continue
        units = surviving_units(graph, kept, group, axes)
        spans, buffers = (
            tuple(_restrict_span(s, units, axes, moved) for s in owned if _move(s.parameter, moved))
            for owned in (group.spans, group.buffers)
        )
        per_block = group.units // group.blocks
        blocks = len({u // per_block for u in units})
        # So many in every block: blocks that went take theirs along.
        minimum = -(-group.minimum * blocks // group.blocks)
        groups.append(
            replace(
                group,
                name=names[group.name],
                units=len(units),
                spans=spans,
                layer=None if group.layer is None else numbers[group.layer],
                blocks=blocks,
                minimum=min(minimum, len(units)),
                modules=tuple(_move(group.modules[u], moved) or "" for u in units) if group.modules else (),
                buffers=buffers,
            )
        )
    shapes, sizes = (_restrict_shapes(tensors, axes, moved) for tensors in (graph.shapes, graph.buffers))
    ties = {n: t for a, b in graph.ties.items() if (n := _move(a, moved)) and (t := _move(b, moved))}
    return CouplingGraph(tuple(groups), shapes, graph.layers, ties, graph.blocked, sizes)


def surviving_units(
    graph: CouplingGraph,
    kept: Kept,
    group: CoupledGroup,
    axes: Mapping[tuple[str, int], list[int]] | None = None,
) -> list[int]:
    """The units of ``group`` that remain: kept, and not taken away by another group that owns the same indices
    (a query head goes with its KV head)."""
    units = list(kept.get(group.name, range(group.units)))
    axes = kept_indices(graph, kept) if axes is None else axes
    for span in group.spans:
        stay = axes.get((span.parameter, span.axis))
        if stay is not None:
            present = set(stay)
            units = [u for u in units if not present.isdisjoint(span.index.of(u))]
    return units


def renamed(graph: CouplingGraph, kept: Kept) -> dict[str, str]:
    """Old group name → name after the cut, for the groups that remain (removed layers renumber the others)."""
    numbers = layer_numbers(graph, kept)
    return {
        g.name: g.name if g.layer is None else g.name.replace(f"layers.{g.layer}.", f"layers.{numbers[g.layer]}.", 1)
        for g in graph.groups
        if g.layer is None or g.layer in numbers
    }


def _restrict_span(
    span: Span, units: list[int], axes: Mapping[tuple[str, int], list[int]], moved: Mapping[str, str | None]
) -> Span:
    stay = axes.get((span.parameter, span.axis))
    rows = [list(span.index.of(u)) for u in units]
    if stay is not None:
        position = {old: new for new, old in enumerate(stay)}
        rows = [[position[i] for i in row if i in position] for row in rows]
    name = _move(span.parameter, moved)
    return Span(name or span.parameter, span.axis, span.role, index_map(rows), span.offset)


def _restrict_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    axes: Mapping[tuple[str, int], list[int]],
    moved: Mapping[str, str | None],
) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(len(axes.get((old, a), range(n))) for a, n in enumerate(shape))
        for old, shape in shapes.items()
        if (name := _move(old, moved)) is not None
    }


def _rescale_norms(model: PreTrainedModel, group: CoupledGroup, count: int) -> None:
    factor = sqrt(group.units / count)
    for span in group.spans_with(Role.NORM):
        parameter = model.get_parameter(span.parameter)
        with torch.no_grad():
            parameter.add_(span.offset).mul_(factor).sub_(span.offset)
        module = model.get_submodule(span.parameter.rpartition(".")[0])
        for name in _EPSILON_NAMES:
            epsilon = getattr(module, name, None)
            if isinstance(epsilon, float):
                setattr(module, name, epsilon * group.units / count)


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer of that name."""
    path, _, leaf = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(path), leaf)
    return tensor


def _replace(model: nn.Module, name: str, cuts: Mapping[int, list[int]], replaced: dict[int, torch.Tensor]) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    table: dict[str, Any] = module._buffers if leaf in module._buffers else module._parameters
    old = table.get(leaf)
    if old is None:
        raise PlanError(f"the plan cuts '{name}', which this model does not have")
    if id(old) not in replaced:
        # Keeping the old tensor alive in `replaced` would hold the memory of every cut parameter: keep the new.
        data = old.data
        for axis, index in cuts.items():
            data = data.index_select(axis, torch.tensor(index, dtype=torch.long, device=data.device))
        data = data.contiguous()
        is_parameter = isinstance(old, nn.Parameter)
        replaced[id(old)] = nn.Parameter(data, requires_grad=old.requires_grad) if is_parameter else data
    table[leaf] = replaced[id(old)]
    follow_shape(module, leaf)


def _module_moves(graph: CouplingGraph, kept: Kept) -> dict[str, str | None]:
    """Path of every decoder layer → its path after the cut (None: removed). Empty when no layer goes."""
    gone = set(removed_modules(graph, kept))
    if not gone:
        return {}
    moves: dict[str, str | None] = {}
    number = 0
    for layer in range(graph.num_layers):
        path = f"{graph.layers}.{layer}"
        if path in gone:
            moves[path] = None
        else:
            moves[path] = f"{graph.layers}.{number}"
            number += 1
    return moves


def layer_numbers(graph: CouplingGraph, kept: Kept) -> dict[int, int]:
    """Layer number before the cut → after it, for the layers that remain."""
    moves = _module_moves(graph, kept)
    if not moves:
        return {n: n for n in range(graph.num_layers)}
    return {n: int(new.rsplit(".", 1)[1]) for n in range(graph.num_layers) if (new := moves[f"{graph.layers}.{n}"])}


def _move(path: str, moves: Mapping[str, str | None]) -> str | None:
    """Where a module or parameter path is after the cut; None when it is gone."""
    for old, new in moves.items():
        if path == old or path.startswith(old + "."):
            return None if new is None else new + path[len(old) :]
    return path


def _drop_layers(model: PreTrainedModel, graph: CouplingGraph, kept: Kept) -> None:
    if removed_modules(graph, kept):
        if not isinstance(model.get_submodule(graph.layers), nn.ModuleList):
            raise PlanError(f"'{graph.layers}' is not a list of layers")
        drop_layers(model, graph.layers, list(layer_numbers(graph, kept)))
