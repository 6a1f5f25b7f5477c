"""Budget: what the amount is a share of; Cost: that, as a function of how many units stay. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ..component import Component, ComponentSettings
from ..errors import SelectionError, UnsupportedModelError
from ..progress import QUIET, Progress
from ..structure.coupling import ATTENTION, LAYER, VOCABULARY, CoupledGroup, CouplingGraph, Role
from ..structure.kept import kept_indices, removed_layers, surviving_units
from ..structure.scope import Queue, build_queue

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..models.family import ModelFamily


class Cost(ABC):
    """The cost of a model as a function of the number of units that its groups keep."""

    label: str
    """What is counted, in the plural."""

    @abstractmethod
    def remaining(self, kept: Mapping[str, int] | None = None, gone: Collection[int] = ()) -> int:
        """The cost of the model with ``kept`` units (group name → number; missing groups keep all) and without the
        decoder layers ``gone`` (their numbers). An integer, so that rounding errors cannot be taken for savings."""


@dataclass(frozen=True)
class BudgetSubject:
    """The model whose cost is counted. ``model``: with its weights, or on the meta device where `Budget.from_shapes`.
    ``groups``: those of ``graph`` that may lose units. ``family``: for trial cuts, updates attributes of modules."""

    model: PreTrainedModel
    graph: CouplingGraph
    groups: Sequence[CoupledGroup]
    family: ModelFamily
    progress: Progress = QUIET


class Budget(Component):
    """Counts a cost of a model as a function of the number of units that each group keeps."""

    kind: ClassVar[str] = "budget"
    hook: ClassVar[str] = "llmpruner_budgets"
    from_shapes: ClassVar[bool] = False
    """Whether `cost` reads shapes alone, so that an amount out of reach is refused before weights are read."""

    def cost(self, subject: BudgetSubject) -> Cost:
        """The cost. Raises `UnsupportedModelError` where it cannot be known for this model."""
        raise NotImplementedError


def counts(graph: CouplingGraph, kept: Mapping[str, Sequence[int]]) -> tuple[dict[str, int], set[int]]:
    """The arguments of `Cost.remaining` for a cut to ``kept`` (group name → kept units)."""
    axes = kept_indices(graph, kept)
    numbers: dict[str, int] = {}
    for name in kept:
        group = graph.by_name[name]
        if group.kind == LAYER:
            continue
        units = surviving_units(kept, group, axes)
        # A block without remaining units was removed by the enclosing group, whose number of units counts that.
        per_block = group.units // group.blocks
        numbers[name] = len(units) * group.blocks // len({u // per_block for u in units})
    return numbers, removed_layers(graph, kept)


def saving_units(
    cost: Cost, groups: Sequence[CoupledGroup], allowed: Mapping[str, frozenset[int] | None],
    alike: Iterable[Sequence[str]],
) -> dict[str, frozenset[int] | None]:  # fmt: skip
    """``allowed`` (group name → removable units, None for all) without units that save nothing of ``cost``. ``alike``:
    groups that keep equally many units; all stay where one saves. Raises `SelectionError` when no unit saves any."""
    saving: dict[str, frozenset[int] | None] = {}
    whole = cost.remaining()
    for group in groups:
        useful = allowed[group.name]
        useful = frozenset(range(group.units)) if useful is None else useful
        least = max(group.minimum, group.blocks)
        if group.kind == LAYER:
            useful = frozenset(unit for unit in useful if cost.remaining(gone=(unit,)) < whole)
        elif least >= group.units or cost.remaining({group.name: least}) >= whole:
            useful = frozenset()
        if useful:
            saving[group.name] = None if len(useful) == group.units else useful
        elif group.kind == VOCABULARY:
            raise SelectionError(f"tokens save nothing of the {cost.label}; count by --budget parameters or bytes")
    if not saving:
        kinds = ", ".join(dict.fromkeys(group.kind for group in groups))
        raise SelectionError(f"{kinds} units save nothing of the {cost.label}; choose others with --kinds")
    for names in alike:
        if any(name in saving for name in names):
            saving |= {name: allowed[name] for name in names if name not in saving}
    return saving


class SizeModel:
    """Sizes of every parameter, tied ones included, by ``kept``: group name → number of units; missing groups keep all.
    Exact for groups that own disjoint indices of an axis, or are nested in equal blocks (query heads in KV heads)."""

    def __init__(self, graph: CouplingGraph, groups: Collection[CoupledGroup]) -> None:
        # In a fused matrix, key/value heads own all rows and query heads some of them; the others stay when these go.
        owners: dict[tuple[str, int], dict[int, tuple[str, ...]]] = {}
        for group in groups:
            for span in group.spans:
                by_index = owners.setdefault((span.parameter, span.axis), {})
                for index in span.indices(range(group.units)):
                    names = by_index.get(index, ())
                    if group.name not in names:
                        by_index[index] = (*names, group.name)
        axes = [(name, axis) for name, shape in graph.shapes.items() for axis in range(len(shape))]
        self._owned = {key: Counter(owners.get(key, {}).values()) for key in axes}
        """Parameter and axis → names of groups → the number of indices that these, and no others, own."""
        self._shapes, self._units = graph.shapes, {group.name: group.units for group in groups}
        self.layer_of = {name: graph.layer_of(name) for name in graph.shapes}
        """Parameter → number of its decoder layer, None outside the decoder layers."""

    def elements(self, name: str, kept: Mapping[str, int]) -> int:
        """Number of remaining elements of parameter ``name``."""
        return prod(self.size(name, axis, kept) for axis in range(len(self._shapes[name])))

    def size(self, name: str, axis: int, kept: Mapping[str, int]) -> int:
        """Remaining size of one axis of parameter ``name``."""
        owned = self._owned[name, axis]
        return self._shapes[name][axis] - sum(n - self._left(n, groups, kept) for groups, n in owned.items())

    def owned(self, name: str, axis: int, group: CoupledGroup, kept: Mapping[str, int]) -> int:
        """Number of remaining indices of one axis among those that ``group`` owns."""
        owned = self._owned[name, axis]
        return sum(self._left(n, groups, kept) for groups, n in owned.items() if group.name in groups)

    def _left(self, count: int, groups: Iterable[str], kept: Mapping[str, int]) -> int:
        for name in groups:
            count = count * kept.get(name, self._units[name]) // self._units[name]
        return count


class WeightCost(Cost):
    """Σ weights[p] · elements(p) over parameters p: weights[p] is 1 to count parameters, or the bytes of an element."""

    def __init__(self, sizes: SizeModel, weights: Mapping[str, int], label: str = "parameters") -> None:
        self.label = label
        self._sizes, self._weights = sizes, weights

    def remaining(self, kept: Mapping[str, int] | None = None, gone: Collection[int] = ()) -> int:
        kept, sizes = kept or {}, self._sizes
        return sum(
            weight * sizes.elements(name, kept)
            for name, weight in self._weights.items()
            if sizes.layer_of[name] not in gone
        )


def parameter_cost(graph: CouplingGraph, groups: Collection[CoupledGroup], *, decoder: bool) -> WeightCost:
    """Parameters of the decoder's layers (``decoder``), or of the whole model; tied ones count once."""
    names = {n: 1 for n in graph.shapes if n not in graph.ties and (graph.is_decoder(n) or not decoder)}
    return WeightCost(SizeModel(graph, groups), names, "decoder parameters" if decoder else "parameters")


class MacsCost(Cost):
    """Multiply-accumulate operations (MACs) to decode one token, exactly as `llmpruner.models.meta` counts them:

        Σ elements(p) · share of p's experts that a token is routed to  +  2 · context · Σ attention channels

    over the parameters p of linear layers. ``multiplied``: p → experts in it that a token is routed to, or None."""

    label = "MACs per token"

    def __init__(
        self, graph: CouplingGraph, groups: Collection[CoupledGroup], multiplied: Mapping[str, int | None], context: int
    ) -> None:
        attention = graph.of_kinds([ATTENTION])
        self._sizes = SizeModel(graph, {g.name: g for g in (*groups, *attention)}.values())
        self._multiplied, self._context = multiplied, context
        self._reads = [
            (group, *key)
            for group in attention
            for key in dict.fromkeys((s.parameter, s.axis) for s in group.spans_with(Role.CONSUMES))
        ]

    def remaining(self, kept: Mapping[str, int] | None = None, gone: Collection[int] = ()) -> int:
        kept, sizes = kept or {}, self._sizes
        weights = 0
        for name, routed in self._multiplied.items():
            if sizes.layer_of[name] in gone:
                continue
            count = sizes.elements(name, kept)
            weights += count if routed is None else count // sizes.size(name, 0, kept) * routed
        width = sum(sizes.owned(name, axis, g, kept) for g, name, axis in self._reads if g.layer not in gone)
        return weights + 2 * self._context * width


class DecoderParameters(Budget):
    name = "decoder"
    summary = "parameters of the decoder's layers, without embeddings, final norm and head"
    from_shapes = True
    decoder: ClassVar[bool] = True

    def cost(self, subject: BudgetSubject) -> WeightCost:
        return parameter_cost(subject.graph, subject.groups, decoder=self.decoder)


class AllParameters(DecoderParameters):
    name = "parameters"
    summary = "all parameters; tied ones count once"
    decoder = False


class WeightBytes(Budget):
    name = "bytes"
    summary = "bytes of all weights in the dtypes that they are loaded in; tied ones count once"
    from_shapes = True

    def cost(self, subject: BudgetSubject) -> WeightCost:
        weights = {name: parameter.element_size() for name, parameter in subject.model.named_parameters()}
        return WeightCost(SizeModel(subject.graph, subject.groups), weights, "bytes of weights")


class Macs(Budget):
    """Multiply-accumulate operations to decode one token while ``context`` tokens are in the cache."""

    name = "macs"
    summary = "multiply-accumulate operations per decoded token"
    from_shapes = True

    class Settings(ComponentSettings):
        context: int = Field(512, ge=1, description="Tokens in the key/value cache.")

    settings: Settings

    def cost(self, subject: BudgetSubject) -> MacsCost:
        from ..models.meta import multiplied

        routed = {name: experts for name, _, experts in multiplied(subject.model)}
        return MacsCost(subject.graph, subject.groups, routed, self.settings.context)


@dataclass(frozen=True)
class CacheCost(Cost):
    """``layers``: bytes of each. ``per_unit``: (group, layer) → those saved with a unit. ``units``: of each group."""

    layers: Sequence[int]
    per_unit: Mapping[tuple[str, int], Fraction]
    units: Mapping[str, int]
    label = "KV-cache bytes per token"

    def remaining(self, kept: Mapping[str, int] | None = None, gone: Collection[int] = ()) -> int:
        kept = kept or {}
        lost = sum(
            rate * (self.units[name] - kept[name])
            for (name, layer), rate in self.per_unit.items()
            if name in kept and layer not in gone
        )
        return round(sum(size for layer, size in enumerate(self.layers) if layer not in gone) - lost)


class KvCache(Budget):
    """Bytes that the key/value cache grows by with every token. Shapes of weights do not tell what is cached (heads,
    one shared head, a latent vector), so the caches of the whole model and of trial cuts are measured."""

    name = "kv-cache"
    summary = "bytes of key/value cache per token"

    def cost(self, subject: BudgetSubject) -> CacheCost:
        """Raises `UnsupportedModelError` for a cache that does not grow with the tokens or the units."""
        from ..discovery.cut import cut_copy

        model, graph, groups = subject.model, subject.graph, subject.groups
        dense = bytes_per_token(model, graph)
        if not sum(dense):
            raise _unknown(model, "does not grow with the tokens")
        # Each trial cuts one group of each layer, so that the change in a layer is that of this group.
        queues = [q for g in groups if g.kind != LAYER and (q := build_queue(g, [0.0] * g.units)).steps]
        rounds: dict[str, list[Queue]] = {}
        for queue in queues:
            rounds.setdefault(queue.group.in_layer(0), []).append(queue)
        per_unit: dict[tuple[str, int], Fraction] = {}
        for together in subject.progress.track(list(rounds.values()), "key/value cache"):
            cut = cut_copy(model, graph, {q.group.name: q.kept_after(1) for q in together}, subject.family)
            after = bytes_per_token(cut, graph)
            for queue in together:
                layers = range(graph.num_layers) if queue.group.layer is None else [queue.group.layer]
                for layer in layers:
                    if saved := dense[layer] - after[layer]:
                        per_unit[queue.group.name, layer] = Fraction(saved, queue.removed_after(1))
        cost = CacheCost(dense, per_unit, {g.name: g.units for g in groups if g.kind != LAYER})
        # An uneven cut, without one layer.
        kept = {q.group.name: q.kept_after(-(-len(q.steps) // (2 + n % 2))) for n, q in enumerate(queues)}
        for group in groups:
            if group.kind == LAYER and group.units > 1:
                kept[group.name] = tuple(u for u in range(group.units) if u != group.units // 2)
        measured = bytes_per_token(cut_copy(model, graph, kept, subject.family) if kept else model, graph)
        if sum(measured) != cost.remaining(*counts(graph, kept)):
            raise _unknown(model, "is not proportional to the units that are kept")
        return cost


def bytes_per_token(model: PreTrainedModel, graph: CouplingGraph) -> list[int]:
    """Bytes that the cache of each decoder layer grows by with every token, before sliding windows are full."""
    two, three, six = (_cached(model, count) for count in (2, 3, 6))
    if len(six) > graph.num_layers:
        raise _unknown(model, "has more parts than the decoder has layers")
    grown = [b - a for a, b in zip(two, three, strict=True)]
    if any(c - a != 4 * g for a, c, g in zip(two, six, grown, strict=True)):
        raise _unknown(model, "does not grow by the same amount with every token")
    return grown + [0] * (graph.num_layers - len(grown))


def _cached(model: PreTrainedModel, count: int) -> list[int]:
    """Bytes in the cache of each layer after ``count`` tokens."""
    import torch
    from torch.utils._pytree import tree_leaves
    from transformers import cache_utils

    from ..models.generation import CachedModel

    cached = CachedModel(model)
    vocabulary = int(model.config.get_text_config().vocab_size)
    cached.process(torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0)))
    sizes = []
    for layer in cached.cache.layers:
        # A class outside transformers' cache module may compress, which a few tokens would not show.
        if type(layer).__module__ != cache_utils.__name__:
            raise _unknown(model, f"is a {type(layer).__name__}, which may not grow with every token")
        sizes.append(sum(leaf.nbytes for leaf in tree_leaves(vars(layer)) if isinstance(leaf, torch.Tensor)))
    return sizes


def _unknown(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the key/value cache of this {model.config.model_type} model {why}, so it cannot be a budget; choose another "
        "--budget"
    )
