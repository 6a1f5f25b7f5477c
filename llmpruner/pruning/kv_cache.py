"""Bytes of key/value cache: how many each layer adds per token, and how many of them each unit saves.

Shapes of weights do not determine what an architecture caches (heads, one shared head, or a latent vector). So the
bytes of the tensors in the cache are counted after processing a few tokens, for the whole model and with one step of
each group cut. An uneven cut without one layer checks that they are proportional to the units kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError
from ..structure.coupling import LAYER, CouplingGraph
from ..structure.scope import Queue, build_queue
from .budgets import Budget, BudgetSubject, Cost, counts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_FEW, _MORE, _MOST = 2, 3, 6
"""Numbers of tokens for which the cache is measured; smaller than any sliding window."""


class CacheCost(Cost):
    """Bytes that the key/value cache grows by with every token.

    ``layers``: bytes of each decoder layer while nothing is cut. ``per_unit``: (group name, layer) → bytes of that
    layer that are saved with each unit of the group. ``units``: group name → its number of units.
    """

    label = "KV-cache bytes per token"

    def __init__(
        self, layers: Sequence[int], per_unit: Mapping[tuple[str, int], Fraction], units: Mapping[str, int]
    ) -> None:
        self._layers, self._per_unit, self._units = layers, per_unit, units

    def remaining(self, kept: Mapping[str, int] | None = None, gone: Collection[int] = ()) -> int:
        kept = kept or {}
        lost = sum(
            rate * (self._units[name] - kept[name])
            for (name, layer), rate in self._per_unit.items()
            if name in kept and layer not in gone
        )
        return round(sum(size for layer, size in enumerate(self._layers) if layer not in gone) - lost)


class KvCache(Budget):
    """Bytes that the key/value cache grows by with every token, counted in the caches of the whole model and of models
    with units of each group removed."""

    name = "kv-cache"
    summary = "bytes of key/value cache per token"

    def cost(self, subject: BudgetSubject) -> CacheCost:
        """Raises `UnsupportedModelError` where the cache does not grow with every token, or where the bytes of a model
        that is cut unevenly are not proportional to its units."""
        from ..discovery.verify import with_rules
        from ..models.surgery import cut_copy

        model, graph, groups = subject.model, subject.graph, subject.groups
        follows = with_rules(subject.family, model, {g.kind for g in groups})
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
            cut = cut_copy(model, graph, {q.group.name: q.kept_after(1) for q in together}, follows)
            after = bytes_per_token(cut, graph)
            for queue in together:
                layers = range(graph.num_layers) if queue.group.layer is None else [queue.group.layer]
                for layer in layers:
                    if after[layer] != dense[layer]:
                        saved = Fraction(dense[layer] - after[layer], queue.removed_after(1))
                        per_unit[queue.group.name, layer] = saved
        cost = CacheCost(dense, per_unit, {g.name: g.units for g in groups if g.kind != LAYER})
        # An uneven cut, without one layer.
        kept = {q.group.name: q.kept_after(-(-len(q.steps) // (2 + n % 2))) for n, q in enumerate(queues)}
        whole = next((g for g in groups if g.kind == LAYER and g.units > 1), None)
        if whole is not None:
            kept[whole.name] = tuple(u for u in range(whole.units) if u != whole.units // 2)
        measured = bytes_per_token(cut_copy(model, graph, kept, follows) if kept else model, graph)
        if sum(measured) != cost.remaining(*counts(graph, kept)):
            raise _unknown(model, "is not proportional to the units that are kept")
        return cost


def bytes_per_token(model: PreTrainedModel, graph: CouplingGraph) -> list[int]:
    """Bytes that the cache of each decoder layer grows by with every token, before sliding windows are full."""
    few, more, most = (_cached(model, count) for count in (_FEW, _MORE, _MOST))
    if len(most) > graph.num_layers:
        raise _unknown(model, "has more parts than the decoder has layers")
    grown = [b - a for a, b in zip(few, more, strict=True)]
    if any(c - a != (_MOST - _FEW) * g for a, c, g in zip(few, most, grown, strict=True)):
        raise _unknown(model, "does not grow by the same amount with every token")
    return grown + [0] * (graph.num_layers - len(grown))


def _cached(model: PreTrainedModel, count: int) -> list[int]:
    import torch
    from torch.utils._pytree import tree_leaves
    from transformers import cache_utils

    from ..models.generation import CachedModel

    cached = CachedModel(model)
    vocabulary = int(model.config.get_text_config().vocab_size)
    cached.process(torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0)))
    for layer in cached.cache.layers:
        # A class outside transformers' cache module may compress, which a few tokens would not show.
        if type(layer).__module__ != cache_utils.__name__:
            raise _unknown(model, f"is a {type(layer).__name__}, which may not grow with every token")
    leaves = [tree_leaves(vars(layer)) for layer in cached.cache.layers]
    return [sum(leaf.nbytes for leaf in own if isinstance(leaf, torch.Tensor)) for own in leaves]


def _unknown(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the key/value cache of this {model.config.model_type} model {why}, so it cannot be a budget; choose another "
        "--budget"
    )
