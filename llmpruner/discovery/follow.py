"""Attributes and tables that must follow a cut, which a trace does not show: found by trying on a small model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..models.modeling_llmpruner import slice_argument
from ..structure.coupling import CoupledGroup, CouplingGraph, in_layer
from ..structure.kept import Kept, layer_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_TRIALS = 162


@dataclass(frozen=True, order=True)
class Follow:
    """``attribute`` of the modules at ``path`` (``*`` for the number of the layer) is scaled with the number of units
    of ``kind``; ``config.NAME``: of a copy of the module's configuration. ``axes``: where a module has several groups
    of the kind (Mamba's channels and its rank), parameters and axes of the group that is counted."""

    kind: str
    path: str
    attribute: str
    axes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, order=True)
class FollowTable:
    """An ``argument`` of the modules at ``path`` has an entry for each unit along ``axis`` (ALiBi slopes)."""

    kind: str
    path: str
    argument: str
    axis: int


Rule = Follow | FollowTable


def apply_rules(rules: Sequence[Rule], model: PreTrainedModel, graph: CouplingGraph, kept: Kept) -> None:
    """Update ``model``, in place, after a cut to ``kept``. ``graph``: before the cut."""
    numbers = layer_numbers(graph, kept)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, units in kept.items():
        group = graph.by_name[name]
        if len(units) == group.units:
            continue
        layers = [new for old, new in numbers.items() if group.layer in (old, None)]
        near = {in_layer(path, graph.layers, "*") for path in _around(graph, group)}
        axes = _axes(graph, group)
        for rule in rules:
            if rule.kind != group.kind or (isinstance(rule, Follow) and rule.axes not in ((), axes)):
                continue
            for layer in layers if "*" in rule.path else [0]:
                if (module := modules.get(rule.path.replace("*", str(layer)))) is None:  # a layer of another type
                    continue
                places = (rule.path, rule.path.rpartition(".")[0] if _has_no_parameters(module) else rule.path)
                if near.isdisjoint(places):
                    continue  # of another group of this kind, which may have as many units by chance
                if isinstance(rule, Follow):
                    _scale(model, module, rule.attribute, len(units), group)
                else:
                    slice_argument(module, rule.argument, rule.axis, group.units, units)


def _scale(model: nn.Module, module: nn.Module, attribute: str, kept: int, group: CoupledGroup) -> None:
    owner: Any = module
    if attribute.startswith("config."):
        owner, attribute = vars(module).get("config"), attribute.partition(".")[2]
    if type(value := getattr(owner, attribute, None)) is not int or not _counts(value, group):
        return  # it counts units of another group of this kind
    if owner is not module and module is not model and not vars(module).get("_config_is_own"):
        owner = module.config = copy.deepcopy(owner)
        object.__setattr__(module, "_config_is_own", True)
    setattr(owner, attribute, value * kept // group.units)


def _counts(value: int, group: CoupledGroup) -> bool:
    """Whether ``value`` may count the units of ``group``, or for units in blocks those of one block."""
    if group.layer is None:
        # Only the hidden size itself is that large; numbers of heads are factors of other sizes too.
        return value == group.units
    return any(size > 1 and value % size == 0 for size in (group.units, group.units // group.blocks))


def candidates(model: PreTrainedModel, graph: CouplingGraph, groups: Iterable[CoupledGroup]) -> list[Follow]:
    """Attributes of modules near the parameters of ``groups`` that may count their units."""
    near = [(group, path, module) for group in groups for path, module in _nearby(model, graph, group)]
    sharing = Counter((group.kind, group.layer, path) for group, path, _ in near)
    rules: set[Follow] = set()
    for group, path, module in near:
        axes = _axes(graph, group) if sharing[group.kind, group.layer, path] > 1 else ()
        names = [name for name, value in _integers(module) if _counts(value, group)]
        rules.update(Follow(group.kind, in_layer(path, graph.layers, "*"), name, axes) for name in names)
    return sorted(rules)


def tables(
    model: PreTrainedModel, graph: CouplingGraph, group: CoupledGroup, batches: Sequence[torch.Tensor]
) -> list[FollowTable]:
    """Tensors with an axis for the units, equal for all ``batches``, that modules near ``group`` get by name."""
    calls: dict[str, list[dict[str, torch.Tensor]]] = {}

    def keep(path: str, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        calls.setdefault(path, []).append(tensors)

    near = _nearby(model, graph, group)
    handles = [module.register_forward_pre_hook(partial(keep, path), with_kwargs=True) for path, module in near]
    with torch.no_grad():
        for tokens in batches:
            model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    rules: set[FollowTable] = set()
    for path, (first, *others) in calls.items():
        if len(others) + 1 != len(batches):  # not called once for each
            continue
        of_layers = in_layer(path, graph.layers, "*")
        for name, value in first.items():
            if all(torch.equal(value, other[name]) for other in others if name in other):
                axes = (axis for axis, size in enumerate(value.shape) if size % group.units == 0)
                rules.update(FollowTable(group.kind, of_layers, name, axis) for axis in axes)
    return sorted(rules)


def _axes(graph: CouplingGraph, group: CoupledGroup) -> tuple[tuple[str, int], ...]:
    return tuple(sorted({(in_layer(span.parameter, graph.layers, "*"), span.axis) for span in group.spans}))


def _nearby(model: PreTrainedModel, graph: CouplingGraph, group: CoupledGroup) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `_around`, and their children without parameters."""
    paths = _around(graph, group)
    for path in paths:
        module = model.get_submodule(path)
        yield path, module
        for name, child in module.named_children():
            if f"{path}.{name}" not in paths and _has_no_parameters(child):
                yield f"{path}.{name}", child


def _around(graph: CouplingGraph, group: CoupledGroup) -> set[str]:
    """The paths of the modules whose parameters are cut, and of those that contain them, within the group's layer."""
    inside = "" if group.layer is None else f"{graph.layers}.{group.layer}"
    paths: set[str] = set()
    for span in group.spans:
        path = span.parameter.rpartition(".")[0]
        while path.startswith(inside) and path:
            paths.add(path)
            path = path.rpartition(".")[0]
    return paths


def _has_no_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is None


def _integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The attributes of a module, and the values of its configuration, that may be numbers of units."""
    config = getattr(vars(module).get("config"), "__dict__", {})
    # `surgery.cut_tensors` sets these.
    known = ("in_features", "out_features", "num_embeddings", "embedding_dim", "nx", "nf", "layer_idx", "padding_idx")
    values = {name: value for name, value in vars(module).items() if name not in known and name[0] != "_"}
    values |= {f"config.{name}": value for name, value in config.items() if name[0] != "_"}
    yield from ((name, value) for name, value in values.items() if type(value) is int and value > 0)


def find(rules: Sequence[Follow], agrees: Callable[..., bool]) -> tuple[Follow, ...] | None:
    """The fewest of ``rules`` with which a cut model ``agrees`` with its reference; None when it never does."""
    chosen = next((subset for subset in islice(_subsets(rules), MAX_TRIALS) if agrees(*subset)), None)
    for rule in reversed(chosen or ()):
        if agrees(*(fewer := tuple(r for r in chosen or () if r != rule))):
            chosen = fewer
    return chosen


def _subsets(rules: Sequence[Follow]) -> Iterator[tuple[Follow, ...]]:
    """None, all, few, and nearly all of ``rules``; those for attributes of modules before those for configurations."""
    of_modules = tuple(rule for rule in rules if not rule.attribute.startswith("config."))
    pools = dict.fromkeys((of_modules, tuple(rules)))
    yield ()
    yield from pools
    for pool in pools:
        for size in (1, 2):
            yield from combinations(pool, size)
            for without in combinations(pool, size):
                yield tuple(rule for rule in pool if rule not in without)
