"""Groups that run through all layers, as the residual stream does, as code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..coupling import Blocks, Role, Span
from .samples import NoRuleError, Rules, Sample
from .source import append, call, generator, listed

_LISTS = {
    (Role.PRODUCES, 1): "embeddings",
    (Role.CONSUMES, 1): "consumers",
    (Role.PRODUCES, 0): "producers",
    (Role.NORM, 0): "norms",
}
"""Role and axis of a weight → the argument of `layouts.hidden_channels`."""

_ROOM = 84


@dataclass(frozen=True)
class Place:
    """A parameter, inside the layers or outside. ``condition``: on ``n`` or on the configuration; "" for always."""

    parameter: str
    inside: bool
    condition: str
    axis: int
    role: Role
    offset: float

    @property
    def module(self) -> str:
        return self.parameter.rpartition(".")[0]

    @property
    def is_bias(self) -> bool:
        return self.parameter.endswith(".bias")


def stream_group(rules: Rules, path: str, name: str) -> str:
    """Statements that append the group ``name``. Raises `NoRuleError`."""
    groups = [s.graph.by_name.get(name) for s in rules.samples]
    if any(g is None for g in groups):
        raise NoRuleError(f"group {name} comes and goes")
    known = [g for g in groups if g is not None]
    if any(s.index != Blocks(g.units) for g in known for s in g.cut_spans) or any(g.buffers for g in known):
        raise NoRuleError(f"group {name} is laid out irregularly")
    units = rules.fit([g.units for g in known], f"the units of {name}")
    places = _places(rules, path, name)
    spans = _builder(rules, places, path, units) or _written_out(rules, places, path, units)
    kind = "HIDDEN" if known[0].kind == "hidden" else f'"{known[0].kind}"'
    arguments = [f'"{name}"', kind, units, "spans"]
    return f"{spans}\n{append(arguments)}"


def _places(rules: Rules, path: str, name: str) -> list[Place]:
    found: dict[tuple[str, bool, int, Role, float], list[set[int]]] = {}
    for number, sample in enumerate(rules.samples):
        for span in sample.graph.by_name[name].spans:
            layer, relative = _split(span, sample, path)
            key = (relative, layer is not None, span.axis, span.role, span.offset)
            found.setdefault(key, [set() for _ in rules.samples])[number].add(layer or 0)
    places = []
    for (parameter, inside, axis, role, offset), layers in found.items():
        if inside:
            condition = rules.layers([frozenset(n) for n in layers], parameter)
        else:
            condition = rules.flag([bool(n) for n in layers], parameter)
        places.append(Place(parameter, inside, "" if condition == "True" else condition, axis, role, offset))
    return places


def _split(span: Span, sample: Sample, path: str) -> tuple[int | None, str]:
    if not sample.graph.is_decoder(span.parameter):
        return None, span.parameter
    number, _, relative = span.parameter.removeprefix(f"{path}.").partition(".")
    return int(number), relative


def _builder(rules: Rules, places: Sequence[Place], path: str, units: str) -> str | None:
    """A call of `layouts.hidden_channels`, where every span is of a kind that it knows."""
    weights = [p for p in places if not p.is_bias]
    biases = [p for p in places if p.is_bias]
    lists: dict[str, list[Place]] = {name: [] for name in ("embeddings", "consumers", "producers", "norms")}
    for place in weights:
        name = _LISTS.get((place.role, place.axis))
        if name is None or place.offset or not place.parameter.endswith(".weight"):
            return None
        lists[name].append(place)
    producers = {(p.module, p.inside) for p in lists["producers"]}
    if any((p.module, p.inside) not in producers or p.role is not Role.PRODUCES for p in biases):
        return None
    arguments = [units, *(f"{name}={_listed(rules, members, path, 'module')}" for name, members in lists.items())]
    if biases:
        arguments.append(f"biased={_listed(rules, biases, path, 'module')}")
    return f"spans = {call('layouts.hidden_channels', arguments)}"


def _listed(rules: Rules, places: Sequence[Place], path: str, what: str) -> str:
    """The paths of ``places`` in every layer, then those outside the layers."""
    layers = rules.fit([s.graph.num_layers for s in rules.samples], "the number of layers")
    items = []
    for condition in dict.fromkeys(p.condition for p in places if p.inside):
        names = [f'"{getattr(p, what)}"' for p in places if p.inside and p.condition == condition]
        clauses = [f"for n in range({layers})" + (f" if {condition}" if condition else "")]
        if len(names) > 1:
            clauses.append(f"for m in {listed(names, '()', _ROOM)}")
        item = f'f"{path}.{{n}}.{{m}}"' if len(names) > 1 else f'f"{path}.{{n}}.{names[0][1:-1]}"'
        items.append(generator(item, clauses, _ROOM))
    for place in places:
        if not place.inside:
            name = f'"{getattr(place, what)}"'
            items.append(f"*([{name}] if {place.condition} else [])" if place.condition else name)
    return listed(items, "[]", _ROOM)


def _written_out(rules: Rules, places: Sequence[Place], path: str, units: str) -> str:
    """Span by span, those inside the layers in comprehensions."""
    layers = rules.fit([s.graph.num_layers for s in rules.samples], "the number of layers")
    items = []
    for key in dict.fromkeys((p.axis, p.role, p.offset, p.condition, p.inside) for p in places):
        axis, role, offset, condition, inside = key
        names = [p.parameter for p in places if (p.axis, p.role, p.offset, p.condition, p.inside) == key]
        rest = f"{axis}, Role.{role.name}, channel" + (f", offset={offset}" if offset else "")
        if not inside:
            spans = [f'Span("{name}", {rest})' for name in names]
            items += [f"*([{span}] if {condition} else [])" if condition else span for span in spans]
            continue
        clauses = [f"for n in range({layers})" + (f" if {condition}" if condition else "")]
        if len(names) > 1:
            clauses.append("for p in " + listed([f'"{name}"' for name in names], "()", _ROOM))
        name = "{p}" if len(names) > 1 else names[0]
        items.append(generator(f'Span(f"{path}.{{n}}.{name}", {rest})', clauses, _ROOM))
    return f"channel = Blocks({units})\nspans = {listed(items, '()')}"
