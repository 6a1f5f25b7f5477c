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

MAX_TRIALS = 160

_AUTOMATIC = frozenset(
    ("in_features", "out_features", "num_embeddings", "embedding_dim", "nx", "nf", "layer_idx", "padding_idx")
)
"""Attributes that `surgery.cut` sets."""


@dataclass(frozen=True, order=True)
class Follow:
    """``attribute`` of the modules at ``path`` (``*`` for the number of the layer) is scaled with the number of units
    of ``kind``. ``config.name`` belongs to the module's own copy of the configuration, which is made when it is set.
    ``axes``: where a layer has several groups of the kind at this module (Mamba's channels and its rank), the
    parameters and axes of the group whose units are counted."""

    kind: str
    path: str
    attribute: str
    axes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, order=True)
class FollowTable:
    """An argument of the modules at ``path`` has an entry for each unit along ``axis`` (ALiBi slopes): only the entries
    of the units that stay are passed to the module."""

    kind: str
    path: str
    argument: str
    axis: int


Rule = Follow | FollowTable


@dataclass(frozen=True)
class Follower:
    """Applies rules after a cut."""

    rules: Sequence[Rule]

    def follow(self, model: PreTrainedModel, graph: CouplingGraph, kept: Kept) -> None:
        """``graph``: before the cut; ``model``: after it."""
        numbers = layer_numbers(graph, kept)
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, units in kept.items():
            group = graph.by_name[name]
            if len(units) == group.units:
                continue
            layers = [numbers[n] for n in sorted(numbers) if group.layer in (n, None)]
            near = {in_layer(path, graph.layers, "*") for path in _around(graph, group)}
            axes = _axes(graph, group)
            for rule in self.rules:
                if rule.kind != group.kind or (isinstance(rule, Follow) and rule.axes not in ((), axes)):
                    continue
                for layer in layers if "*" in rule.path else [0]:
                    module = modules.get(rule.path.replace("*", str(layer)))
                    if module is None:  # a layer of another type
                        continue
                    bare = not any(True for _ in module.parameters())
                    if rule.path not in near and not (bare and rule.path.rpartition(".")[0] in near):
                        continue  # it belongs to another group of this kind, whose size may be the same by chance
                    if isinstance(rule, Follow):
                        _scale(model, module, rule.attribute, len(units), group)
                    else:
                        slice_argument(module, rule.argument, rule.axis, group.units, units)


def _scale(model: nn.Module, module: nn.Module, attribute: str, kept: int, group: CoupledGroup) -> None:
    owner: Any = module
    if attribute.startswith("config."):
        owner, attribute = vars(module).get("config"), attribute.partition(".")[2]
    value = getattr(owner, attribute, None)
    if type(value) is not int or not _counts(value, group):
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
    near = [(group, dict(_nearby(model, graph, group))) for group in groups]
    sharing = Counter((group.kind, group.layer, path) for group, modules in near for path in modules)
    found: set[Follow] = set()
    for group, modules in near:
        for path, module in modules.items():
            axes = _axes(graph, group) if sharing[group.kind, group.layer, path] > 1 else ()
            for name, value in _integers(module):
                if _counts(value, group):
                    found.add(Follow(group.kind, in_layer(path, graph.layers, "*"), name, axes))
    return sorted(found)


def _axes(graph: CouplingGraph, group: CoupledGroup) -> tuple[tuple[str, int], ...]:
    return tuple(sorted({(in_layer(span.parameter, graph.layers, "*"), span.axis) for span in group.spans}))


def tables(
    model: PreTrainedModel, graph: CouplingGraph, group: CoupledGroup, batches: Sequence[torch.Tensor]
) -> list[FollowTable]:
    """Tensors passed by name to modules near the parameters of ``group``, equal for all ``batches`` of token ids and so
    no activations, with an axis for the units."""
    calls: dict[str, list[dict[str, torch.Tensor]]] = {}

    def keep(path: str, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        calls.setdefault(path, []).append(tensors)

    handles = [
        module.register_forward_pre_hook(partial(keep, path), with_kwargs=True)
        for path, module in _nearby(model, graph, group)
    ]
    with torch.no_grad():
        for tokens in batches:
            model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    found: set[FollowTable] = set()
    for path, (first, *others) in calls.items():
        if len(others) + 1 != len(batches):  # not called once for each
            continue
        of_layers = in_layer(path, graph.layers, "*")
        for name, value in first.items():
            if all(torch.equal(value, other[name]) for other in others if name in other):
                axes = (axis for axis, size in enumerate(value.shape) if size % group.units == 0)
                found.update(FollowTable(group.kind, of_layers, name, axis) for axis in axes)
    return sorted(found)


def _nearby(model: PreTrainedModel, graph: CouplingGraph, group: CoupledGroup) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `_around`, and their children without parameters."""
    paths = _around(graph, group)
    for path in paths:
        module = model.get_submodule(path)
        yield path, module
        for name, child in module.named_children():
            if f"{path}.{name}" not in paths and not any(True for _ in child.parameters()):
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


def _integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    for name, value in vars(module).items():
        if type(value) is int and value > 0 and name not in _AUTOMATIC and not name.startswith("_"):
            yield name, value
    config = vars(module).get("config")
    for name, value in (vars(config) if config is not None else {}).items():
        if type(value) is int and value > 0 and not name.startswith("_"):
            yield f"config.{name}", value


def find(rules: Sequence[Rule], agrees: Callable[[Sequence[Rule]], bool]) -> tuple[Rule, ...] | None:
    """The fewest of ``rules`` with which a cut model agrees with its reference; None when it never does."""
    chosen = next((subset for subset in islice(_subsets(rules), MAX_TRIALS + 2) if agrees(subset)), None)
    for rule in reversed(chosen or ()):
        fewer = tuple(r for r in chosen or () if r != rule)
        if agrees(fewer):
            chosen = fewer
    return chosen


def _subsets(rules: Sequence[Rule]) -> Iterator[tuple[Rule, ...]]:
    own = tuple(r for r in rules if not (isinstance(r, Follow) and r.attribute.startswith("config.")))
    yield ()
    if own and len(own) < len(rules):
        yield own
    yield tuple(rules)
    for among in dict.fromkeys((own, tuple(rules))):
        for size in (1, 2):
            yield from combinations(among, size)
            for without in combinations(among, size):
                yield tuple(f for f in among if f not in without)
