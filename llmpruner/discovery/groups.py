"""Discovery: from a configuration to named coupled groups over all layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..models.decoder import graph_of
from ..models.empty import meta_model
from ..structure.coupling import (
    ATTENTION,
    EXPERT,
    HIDDEN,
    LAYER,
    MLP,
    QUERY,
    Blocked,
    CoupledGroup,
    CouplingGraph,
    Role,
    Span,
)
from . import operators_math, operators_shape  # noqa: F401  (they register their rules)
from .ids import Mark
from .propagate import Policy, Propagation
from .trace import Trace, trace
from .units import Family, Share, families

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LATENT = "latent"
"""Channels inside another sub-layer: the low rank of multi-head latent attention, channels of a state space."""

_CROSS_LAYER = "cross-layer"
"""Channels that several layers share without being the residual stream; not offered."""

_ORDER = (ATTENTION, MLP, QUERY, EXPERT, LATENT)


@dataclass(frozen=True)
class Named:
    """A family with its kind; ``layer`` is the traced layer, None for the residual stream."""

    kind: str
    layer: int | None
    family: Family


_blocked: ContextVar[dict[tuple[str, int], Blocked] | None] = ContextVar("_blocked", default=None)


@contextmanager
def collect_blocked() -> Iterator[Collection[Blocked]]:
    """What `discover_groups` finds blocked inside the ``with`` statement. A family returns groups alone, and may change
    those that discovery found; this is how the reasons reach the graph all the same."""
    collected: dict[tuple[str, int], Blocked] = {}
    token = _blocked.set(collected)
    try:
        yield collected.values()
    finally:
        _blocked.reset(token)


def discover_groups(config: PreTrainedConfig) -> Sequence[CoupledGroup]:
    """The coupled groups of a model with this configuration, found by tracing it without weights.

    Raises `UnsupportedModelError` when the model cannot be traced.
    """
    graph = discover_graph(config)
    collected = _blocked.get()
    if collected is not None:
        collected.update({(b.parameter, b.axis): b for b in graph.blocked})
    return graph.groups


def discover_graph(config: PreTrainedConfig) -> CouplingGraph:
    """As `discover_groups`, with the shapes and, for every axis that is not offered, the reason."""
    found, reasons, traced = _named(trace(config))
    if any(n.layer is None and n.kind != HIDDEN for n in found) and _is_shallow(traced):
        # Something couples several layers, so one traced layer does not represent the others.
        found, reasons, traced = _named(trace(config, shallow=False))
    found = [n for n in found if n.layer is not None or n.kind == HIDDEN]
    model = meta_model(config)
    aliases = _aliases(model)
    groups = list(_groups(found, traced, aliases))
    layers = [f"{traced.layers}.{m}" for m in sorted(m for ms in traced.stands_for.values() for m in ms)]
    blocked: tuple[Blocked, ...] = ()
    if traced.streams == 1:
        groups.append(CoupledGroup("layers", LAYER, len(layers), modules=tuple(layers)))
    else:
        blocked = (Blocked(traced.layers, 0, "layers are given more than the residual stream"),)
    blocked += tuple(
        Blocked(name, axis, reason)
        for (parameter, axis), reason in reasons.items()
        for name in _everywhere(parameter, traced)
    )
    return replace(graph_of(model, lambda: groups), blocked=blocked)


def _is_shallow(traced: Trace) -> bool:
    return any(len(members) > 1 for members in traced.stands_for.values())


def _named(traced: Trace) -> tuple[list[Named], dict[tuple[str, int], str], Trace]:
    canonical = {alias: names[0] for names in _aliases(traced.model).values() for alias in names}
    rigid, reasons = _pass(traced, Policy(), canonical)
    found = [_name(f, traced) for f in rigid if f.units > 1]
    elastic, _ = _pass(traced, Policy(elastic=True), canonical)
    for family in elastic:
        if family.blocks > 1 and family.units > family.blocks:
            named = _name(family, traced)
            if named.layer is not None and Mark.ROUTED in family.marks:
                found.append(named)
            elif named.layer is not None and Mark.ATTENDS in family.marks:
                found.append(replace(named, kind=QUERY))
    offered = {(s.parameter, s.axis) for n in found for s in n.family.shares}
    return _latent(found), {slot: reason for slot, reason in reasons.items() if slot not in offered}, traced


def _pass(
    traced: Trace, policy: Policy, canonical: Mapping[str, str]
) -> tuple[list[Family], dict[tuple[str, int], str]]:
    run = Propagation(policy)
    run.run(traced.program, canonical)
    usable, reasons = families(run)
    return [f for f in usable if _has_an_end(f)], reasons


def _has_an_end(family: Family) -> bool:
    """Whether a weight consumes the units, or a router chooses them: others cannot be silenced, and so not checked."""
    return Mark.ROUTED in family.marks or any(s.role is Role.CONSUMES for s in family.shares)


def _name(family: Family, traced: Trace) -> Named:
    numbers = {_layer_of(s.parameter, traced.layers) for s in family.shares}
    if len(numbers) > 1 or None in numbers:
        outside = None in numbers
        return Named(HIDDEN if outside else _CROSS_LAYER, None, family)
    (layer,) = numbers
    if Mark.ROUTED in family.marks:
        return Named(EXPERT, layer, family)
    if Mark.ATTENDS in family.marks or all(s.rows.shape[1] > 1 for s in family.shares):
        return Named(ATTENTION, layer, family)
    return Named(MLP, layer, family)


def _latent(found: list[Named]) -> list[Named]:
    """``found``, with channels inside an attention module renamed from `MLP` to `LATENT`."""
    attention = {
        (n.layer, _common_module(n.family)) for n in found if n.kind == ATTENTION and Mark.ATTENDS in n.family.marks
    }
    # Where a whole layer is one flat module, the paths do not separate its parts.
    attention = {(layer, path) for layer, path in attention if not path.endswith(f".{layer}")}
    return [
        replace(n, kind=LATENT)
        if n.kind == MLP
        and any(n.layer == at and f"{_common_module(n.family)}.".startswith(f"{path}.") for at, path in attention)
        else n
        for n in found
    ]


def _layer_of(parameter: str, layers: str) -> int | None:
    prefix = layers + "."
    return int(parameter[len(prefix) :].split(".", maxsplit=1)[0]) if parameter.startswith(prefix) else None


def _common_module(family: Family) -> str:
    paths = [s.parameter.split(".")[:-1] for s in family.shares]
    common = paths[0]
    for path in paths[1:]:
        common = [a for n, a in enumerate(common[: len(path)]) if common[: n + 1] == path[: n + 1]]
    return ".".join(common)


def _groups(found: Iterable[Named], traced: Trace, aliases: Mapping[int, list[str]]) -> Iterator[CoupledGroup]:
    """Coupled groups of the real model, layer by layer, then the residual stream."""
    tied = {names[0]: names for names in aliases.values() if len(names) > 1}
    by_layer: dict[int, list[Named]] = {}
    for named in found:
        if named.layer is not None:
            by_layer.setdefault(named.layer, []).append(named)
    real = {m: traced_number for traced_number, members in traced.stands_for.items() for m in members}
    for number in sorted(real):
        members = sorted(by_layer.get(real[number], []), key=lambda n: _ORDER.index(n.kind))
        for name, named in zip(_names(members, traced), members, strict=True):
            spans, buffers = (
                tuple(replace(s, parameter=_renumber(s.parameter, traced.layers, number)) for s in _spans(shares, {}))
                for shares in (named.family.shares, named.family.buffers)
            )
            yield _group(f"layers.{number}.{name}", named, spans, buffers, number)
    streams = [n for n in found if n.layer is None]
    for position, named in enumerate(sorted(streams, key=lambda n: -n.family.units)):
        spans, buffers = (
            tuple(
                replace(span, parameter=name)
                for span in _spans(shares, tied)
                for name in _everywhere(span.parameter, traced)
            )
            for shares in (named.family.shares, named.family.buffers)
        )
        yield _group(HIDDEN if position == 0 else f"{HIDDEN}.{position}", named, spans, buffers, None)


def _group(
    name: str, named: Named, spans: tuple[Span, ...], buffers: tuple[Span, ...], layer: int | None
) -> CoupledGroup:
    family = named.family
    blocks = family.blocks if family.units % family.blocks == 0 else 1
    # As many experts as are chosen at a time must stay, even where all of them come from one block.
    minimum = blocks * (family.minimum if Mark.ROUTED in family.marks else 1)
    multiple = _alignment(family)
    return CoupledGroup(name, named.kind, family.units, spans, layer, blocks, minimum, multiple, buffers=buffers)


def _alignment(family: Family) -> int:
    """Grouped matrix products over experts need rows of 16 bytes: 8 numbers of 16 bits."""
    if not any(s.rank == 3 and s.axis > 0 for s in family.shares):
        return 1
    return next(n for n in (8, 4, 2, 1) if family.units % n == 0)


def _spans(shares: Iterable[Share], tied: Mapping[str, Sequence[str]]) -> Iterator[Span]:
    for share in shares:
        names = tied.get(share.parameter, [share.parameter])
        for name in names:
            role = share.role
            if len(names) > 1 and share.axis == 1:
                # A table that is both embedding and head produces in one place and consumes in the other.
                role = Role.PRODUCES if name == names[0] else Role.CONSUMES
            for index in share.index_maps():
                yield Span(name, share.axis, role, index, share.offset)


def _names(members: Sequence[Named], traced: Trace) -> list[str]:
    """Short names within a layer: the kind, with the module where several groups share a kind."""
    count = Counter(n.kind for n in members)
    names: list[str] = []
    for named in members:
        name = "experts" if named.kind == EXPERT else named.kind
        if count[named.kind] > 1:
            module = _common_module(named.family).removeprefix(f"{traced.layers}.{named.layer}").strip(".")
            name = f"{name}.{module}" if module else name
        while name in names:
            stem, _, number = name.rpartition("#")
            name = f"{stem}#{int(number) + 1}" if stem and number.isdigit() else f"{name}#2"
        names.append(name)
    return names


def _renumber(parameter: str, layers: str, number: int) -> str:
    prefix = layers + "."
    rest = parameter[len(prefix) :].partition(".")[2]
    return f"{prefix}{number}.{rest}"


def _everywhere(parameter: str, traced: Trace) -> list[str]:
    """The names of the parameter in all real layers that its traced layer represents."""
    layer = _layer_of(parameter, traced.layers)
    if layer is None:
        return [parameter]
    return [_renumber(parameter, traced.layers, number) for number in traced.stands_for[layer]]


def _aliases(model: PreTrainedModel) -> dict[int, list[str]]:
    """Parameters by identity, each with all the names it is stored under."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names
