"""Verdicts of the oracle for every kind of unit, on a small model of the architecture."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError
from ..models.stock import for_all_layers
from ..structure.coupling import ATTENTION, CouplingGraph
from .groups import build_graph
from .oracle import REFUSED, Oracle, Verdict
from .tiny import HEADS, small_configs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..models.family import ModelFamily


def verify(
    family: ModelFamily, config: PreTrainedConfig, *, kinds: Collection[str] | None = None, seed: int = 0
) -> list[Verdict]:
    """`check_kinds` on a `representative` of ``config``; kinds that it lacks are refused."""
    small, graph = representative(config, family, kinds)
    verdicts = check_kinds(family, small, graph, kinds=kinds, seed=seed)
    lacking = sorted(set(kinds or ()) - {verdict.kind for verdict in verdicts})
    return verdicts + [Verdict(kind, 0, 0, REFUSED, reason="a small model has no such units") for kind in lacking]


def check_kinds(
    family: ModelFamily,
    config: PreTrainedConfig,
    graph: CouplingGraph | None = None,
    *,
    kinds: Collection[str] | None = None,
    seed: int = 0,
) -> list[Verdict]:
    """A verdict for each of ``kinds`` (None: all) on a random model of ``config``. ``graph``: of it, if known."""
    graph = graph or build_graph(family, config)
    oracle = Oracle(config, graph, family, seed)
    return [oracle.judge(kind) for kind in graph.kinds if kinds is None or kind in kinds]


def representative(
    config: PreTrainedConfig, family: ModelFamily, kinds: Collection[str] | None = None
) -> tuple[PreTrainedConfig, CouplingGraph]:
    """A small configuration and its graph: the first that has all ``kinds`` (None: heads, if the model counts any), or
    else the most of them. Raises `UnsupportedModelError` when no small model can be traced."""
    text = for_all_layers(config.get_text_config())
    heads = {ATTENTION} if getattr(text, "num_attention_heads", None) else set()
    required = heads if kinds is None else set(kinds)
    incomplete: list[tuple[int, PreTrainedConfig, CouplingGraph]] = []
    failed: list[UnsupportedModelError] = []
    for small in islice(small_configs(config), len(HEADS)):
        try:
            graph = build_graph(family, small)
        except UnsupportedModelError as error:
            failed.append(error)
            continue
        if not (missing := required.difference(graph.kinds)):
            return small, graph
        incomplete.append((len(missing), small, graph))
    if not incomplete:
        raise failed[0]
    return min(incomplete, key=itemgetter(0))[1:]
