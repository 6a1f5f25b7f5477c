"""Verdicts of the oracle for every kind of unit: those that `discover --verify` shows, and what must follow a cut."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, cast

from ..errors import UnsupportedModelError
from ..models.config import for_all_layers
from ..models.meta import graph_of
from ..models.shim import stock_config
from ..structure.coupling import ATTENTION, LAYER, CoupledGroup, CouplingGraph, Role, Span, runs
from ..values import counted
from .follow import Follower, Rule
from .groups import discover_groups
from .oracle import VERIFIED, Oracle, Verdict
from .tiny import HEADS, fingerprint, random_instance, small_config, small_configs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..structure.kept import Follows
    from .family import ModelFamily

Slot = tuple[str, int]
"""A parameter (or buffer) and one of its axes."""
_FOUND: dict[tuple[object, str], Verdict] = {}
"""Verdicts of this process by architecture and kind. They hold for all sizes of one architecture, which are reduced to
the same small model."""


def verify(
    source: ModelFamily | Sequence[CoupledGroup] | None,
    config: PreTrainedConfig,
    *,
    kinds: Iterable[str] | None = None,
    seed: int = 0,
    shrink: bool = True,
) -> list[Verdict]:
    """Check every kind of unit of ``source`` on a small random model of the architecture of ``config``.

    ``source``: a family; groups of exactly ``config`` (then pass ``shrink=False``); or None for discovery.
    One verdict per kind, in order of appearance. Raises `UnsupportedModelError` when the small model cannot be
    built or traced.
    """
    kinds = None if kinds is None else list(kinds)
    family = None if source is None or isinstance(source, Sequence) or source.is_discovered else source
    small = config
    if shrink:
        small = representative(config, kinds) if family is None else small_config(config)
    model = random_instance(small, seed)
    if source is None:
        graph = graph_of(model, lambda: discover_groups(small))
    elif not isinstance(source, Sequence):
        graph = graph_of(model, lambda: source.coupled_groups(small))
    else:
        graph = graph_of(model, lambda: source)
    wanted = graph.kinds if kinds is None else [k for k in graph.kinds if k in set(kinds)]
    oracle = Oracle(small, graph, family, seed)
    verdicts = [oracle.judge(kind) for kind in wanted]
    if source is None or all(v.verdict == VERIFIED for v in verdicts):
        return verdicts
    return _with_differences(verdicts, graph, small)


def representative(config: PreTrainedConfig, kinds: Collection[str] | None = None) -> PreTrainedConfig:
    """A small configuration of the class of ``config`` whose model has units of ``kinds`` (None: heads, where the
    configuration counts any): a class may spread its heads over a fixed number of parts, and has none with another
    number of heads. The first that runs, where no other has more of them.

    Raises `UnsupportedModelError` when no small model can be built, run and traced.
    """
    text = for_all_layers(config.get_text_config())
    heads = {ATTENTION} if getattr(text, "num_attention_heads", None) else set()
    wanted = heads if kinds is None else set(kinds)
    found: list[tuple[int, PreTrainedConfig]] = []
    failed: list[UnsupportedModelError] = []
    for small in islice(small_configs(config), len(HEADS)):
        try:
            missing = wanted - {group.kind for group in discover_groups(small)}
        except UnsupportedModelError as error:
            failed.append(error)
            continue
        found.append((len(missing), small))
        if not missing:
            break
    if not found:
        raise failed[0]
    return min(found, key=lambda one: one[0])[1]


def _with_differences(verdicts: Sequence[Verdict], graph: CouplingGraph, config: PreTrainedConfig) -> list[Verdict]:
    """``verdicts``, with ``differences`` of the groups of ``graph`` from discovered ones where not *verified*."""
    try:
        discovered = discover_groups(config)
    except UnsupportedModelError as error:
        nothing = f"the groups were not compared with discovered ones: {error}"
        return [v if v.verdict == VERIFIED else replace(v, differences=(nothing,)) for v in verdicts]
    return [
        v if v.verdict == VERIFIED else replace(v, differences=differences(graph.of_kinds([v.kind]), discovered))
        for v in verdicts
    ]


def differences(declared: Iterable[CoupledGroup], discovered: Iterable[CoupledGroup]) -> tuple[str, ...]:
    """One line for each parameter in which a declared group differs from the discovered group of the same name: a span
    that is missing, one that discovery does not have, or other indices, roles or offsets. A difference that occurs in
    several layers is reported once, with the number of the others. Groups without a counterpart are not compared."""
    by_name = {group.name: group for group in discovered}
    lines: dict[str, list[str]] = {}
    for group in declared:
        if group.name in by_name and group.spans:
            for line in _between(group, by_name[group.name]):
                in_any_layer = line if group.layer is None else line.replace(f".{group.layer}.", ".*.")
                lines.setdefault(in_any_layer, []).append(line)
    return tuple(
        first + (f" (and alike in {counted(len(others), 'other layer')})" if others else "")
        for first, *others in lines.values()
    )


def _between(declared: CoupledGroup, found: CoupledGroup) -> list[str]:
    for what in ("units", "blocks"):
        ours, theirs = getattr(declared, what), getattr(found, what)
        if ours != theirs:
            return [f"group {declared.name}: {ours} {what}, discovery finds {theirs}"]
    lines = []
    for spans, others in ((declared.spans, found.spans), (declared.buffers, found.buffers)):
        ours, theirs = _by_slot(spans), _by_slot(others)
        for slot in dict.fromkeys((*ours, *theirs)):
            difference = _of_slot(ours.get(slot, ()), theirs.get(slot, ()), declared.units)
            if difference:
                lines.append(f"group {declared.name}: {slot[0]} axis {slot[1]}: {difference}")
    return lines


def _by_slot(spans: Sequence[Span]) -> Mapping[Slot, tuple[Span, ...]]:
    slots: dict[Slot, tuple[Span, ...]] = {}
    for span in spans:
        key = span.parameter, span.axis
        slots[key] = (*slots.get(key, ()), span)
    return slots


def _of_slot(ours: Sequence[Span], theirs: Sequence[Span], units: int) -> str:
    if not ours:
        return f"missing; discovery finds {_maps(theirs)}"
    if not theirs:
        return f"extra; declared {_maps(ours)}, and discovery finds that no unit owns any of it"
    for unit in range(units):
        mine, other = _owned(ours, unit), _owned(theirs, unit)
        if mine != other:
            return f"unit {unit} owns {_runs(mine)}; discovery finds {_runs(other)}"
    for what in ("role", "offset"):
        mine, other = ({getattr(span, what) for span in spans} for spans in (ours, theirs))
        if mine != other:
            return f"{what} {_values(mine)}; discovery finds {_values(other)}"
    return ""


def _maps(spans: Sequence[Span]) -> str:
    return " and ".join(str(span.index) for span in spans)


def _owned(spans: Sequence[Span], unit: int) -> set[int]:
    return {index for span in spans for index in span.index.of(unit)}


def _values(values: Iterable[object]) -> str:
    return " and ".join(sorted(v.value if isinstance(v, Role) else str(v) for v in values))


def _runs(indices: set[int]) -> str:
    """``{0, 1, 2, 7}`` as ``0…2, 7``; after four runs, the total number of indices."""
    found = runs(sorted(indices))
    shown = ", ".join(str(first) if first == last else f"{first}…{last}" for first, last in found[:4])
    return f"{shown}, … ({len(indices)} indices)" if len(found) > 4 else shown


def rules_of(config: PreTrainedConfig, kinds: Iterable[str], family: ModelFamily | None = None) -> tuple[Rule, ...]:
    """The rules for cuts of ``kinds`` in models of the architecture of ``config``, found on a small model at most once
    in a process for each architecture and kind.

    ``family``: declares the groups; None: they are discovered. Raises `UnsupportedModelError` when a kind cannot be cut
    exactly, or the small model has no units of it.
    """
    wanted = sorted(set(kinds))
    architecture = type(family), *fingerprint(config)
    missing = [kind for kind in wanted if (architecture, kind) not in _FOUND]
    if missing:
        _FOUND.update({(architecture, v.kind): v for v in verify(family, config, kinds=missing)})
    found: dict[Rule, None] = {}
    for kind in wanted:
        verdict = _FOUND.get((architecture, kind))
        if verdict is None:
            raise UnsupportedModelError(
                f"what must follow a cut of {kind} units cannot be found: a small {config.model_type} model has none"
            )
        if verdict.verdict != VERIFIED:
            raise UnsupportedModelError(
                f"cutting {kind} units of a {config.model_type} model is {verdict.verdict}: {verdict.reason}"
            )
        found.update(dict.fromkeys(verdict.follows))
    return tuple(found)


def with_rules(family: Follows, model: PreTrainedModel, kinds: Collection[str]) -> Follows:
    """``family``, or if its rules are discovered, the rules for cuts of ``kinds``."""
    if not getattr(family, "is_discovered", False):
        return family
    return Follower(rules_of(stock_config(model), set(kinds) - {LAYER}, cast("ModelFamily", family)))
