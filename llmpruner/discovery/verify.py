"""Verdicts of the oracle for every kind of unit: those that `discover --verify` shows, and what must follow a cut."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError
from ..models.meta import graph_of, meta_model
from ..models.save import stock_config
from ..models.stock import for_all_layers
from ..structure.coupling import ATTENTION, LAYER, CoupledGroup, Span
from .follow import Follower, Rule
from .oracle import VERIFIED, Oracle, Verdict
from .tiny import HEADS, fingerprint, small_configs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..models.surgery import Follows
    from .family import ModelFamily

_FOUND: dict[tuple[object, str], Verdict] = {}
"""Verdicts of this process by architecture and kind: all sizes of one are reduced to the same small model."""


def verify(
    family: ModelFamily, config: PreTrainedConfig, *, kinds: Collection[str] | None = None, seed: int = 0
) -> list[Verdict]:
    """`check_kinds` on a small model of the architecture of ``config``, or `UnsupportedModelError` where none runs."""
    small, groups = representative(config, family, kinds)
    return check_kinds(family, small, groups, kinds=kinds, seed=seed)


def check_kinds(
    family: ModelFamily,
    config: PreTrainedConfig,
    groups: Sequence[CoupledGroup] | None = None,
    *,
    kinds: Collection[str] | None = None,
    seed: int = 0,
) -> list[Verdict]:
    """A verdict for every kind of unit, or ``kinds``, of a random model of ``config`` with ``groups`` (if known)."""
    graph = graph_of(meta_model(config), family.coupled_groups(config) if groups is None else groups)
    oracle = Oracle(config, graph, family, seed)
    return [oracle.judge(kind) for kind in graph.kinds if kinds is None or kind in kinds]


def representative(
    config: PreTrainedConfig, family: ModelFamily, kinds: Collection[str] | None = None
) -> tuple[PreTrainedConfig, Sequence[CoupledGroup]]:
    """The first small configuration whose model has the most of ``kinds`` (None: heads, if the configuration counts
    any), and its groups: a class that spreads heads over a fixed number of parts has none with another number.
    Raises `UnsupportedModelError` when no small model can be traced."""
    text = for_all_layers(config.get_text_config())
    heads = {ATTENTION} if getattr(text, "num_attention_heads", None) else set()
    required = heads if kinds is None else set(kinds)
    runnable: list[tuple[int, PreTrainedConfig, Sequence[CoupledGroup]]] = []
    failed: list[UnsupportedModelError] = []
    for small in islice(small_configs(config), len(HEADS)):
        try:
            groups = family.coupled_groups(small)
        except UnsupportedModelError as error:
            failed.append(error)
            continue
        missing = required - {group.kind for group in groups}
        if not missing:
            return small, groups
        runnable.append((len(missing), small, groups))
    if not runnable:
        raise failed[0]
    return min(runnable, key=itemgetter(0))[1:]


def differences(declared: Iterable[CoupledGroup], discovered: Iterable[CoupledGroup]) -> list[str]:
    """One line for each axis of a parameter on which a declared group differs from the discovered group of the same
    name in indices, roles or offsets; of several layers, the first. Groups without a counterpart are not compared."""
    by_name = {group.name: group for group in discovered}
    lines: dict[str, str] = {}
    for group in declared:
        other = by_name.get(group.name)
        if other is None or not group.spans:
            continue
        ours, theirs = _facts(group), _facts(other)
        for what in dict.fromkeys((*ours, *theirs)):
            (text, value), (expected_text, expected) = (facts.get(what, ("nothing", None)) for facts in (ours, theirs))
            if value != expected:
                line = f"group {group.name}: {what}{text}; discovery finds {expected_text}"
                lines.setdefault(line if group.layer is None else line.replace(f".{group.layer}.", ".*."), line)
    return list(lines.values())


def _facts(group: CoupledGroup) -> dict[str, tuple[str, object]]:
    """The size, and parameter and axis → as text, and as a value: `Blocks` and `Explicit` may own the same indices."""
    size = f"{group.units} units in {group.blocks} blocks"
    facts: dict[str, tuple[str, object]] = {"": (size, size)}
    slots: dict[tuple[str, int], list[Span]] = {}
    for span in group.cut_spans:
        slots.setdefault((span.parameter, span.axis), []).append(span)
    for (parameter, axis), spans in slots.items():
        texts = [f"{s.index} ({s.role.value}{f', offset {s.offset:g}' if s.offset else ''})" for s in spans]
        owned = [{index for span in spans for index in span.index.of(unit)} for unit in range(group.units)]
        facts[f"{parameter} axis {axis}: "] = " and ".join(texts), ({(s.role, s.offset) for s in spans}, owned)
    return facts


def rules_of(config: PreTrainedConfig, kinds: Iterable[str], family: ModelFamily) -> tuple[Rule, ...]:
    """The rules for cuts of ``kinds``, found once in a process. `UnsupportedModelError` where one can't be cut."""
    kinds = sorted(set(kinds))
    architecture = type(family), *fingerprint(config)
    if missing := [kind for kind in kinds if (architecture, kind) not in _FOUND]:
        _FOUND.update({(architecture, v.kind): v for v in verify(family, config, kinds=missing)})
    rules: list[Rule] = []
    for kind in kinds:
        verdict = _FOUND.get((architecture, kind))
        if verdict is None:
            raise UnsupportedModelError(
                f"what must follow a cut of {kind} units cannot be found: a small {config.model_type} model has none"
            )
        if verdict.verdict != VERIFIED:
            raise UnsupportedModelError(
                f"cutting {kind} units of a {config.model_type} model is {verdict.verdict}: {verdict.reason}"
            )
        rules += verdict.follows
    return tuple(rules)


def with_rules(family: ModelFamily, model: PreTrainedModel, kinds: Collection[str]) -> Follows:
    """``family``, or if its rules are discovered, the rules for cuts of ``kinds``."""
    if not family.is_discovered:
        return family
    return Follower(rules_of(stock_config(model), set(kinds) - {LAYER}, family))
