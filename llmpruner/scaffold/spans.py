"""Discovered groups as code that declares them: one rule per kind of group, checked against every sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .. import coupling, layouts
from ..coupling import Blocks, CoupledGroup, Role, Span
from .refresh import refresh_method
from .samples import NoRuleError, Rules, Sample, take_samples
from .source import append, call, indented, listed, uses
from .stream import stream_group

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_KINDS = {getattr(coupling, n): n for n in ("ATTENTION", "EXPERT", "HIDDEN", "LAYER", "MLP", "QUERY", "VOCABULARY")}
_NAMES = {"layouts": layouts, "Blocks": Blocks, "Span": Span, "Role": Role}


@dataclass(frozen=True)
class Code:
    """Methods of a family, and the names of llmpruner they use. ``config``: the small configuration with the most
    ``kinds`` of units."""

    source: str
    imports: tuple[str, ...]
    config: PreTrainedConfig
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Pattern:
    """One span in every layer that has it. ``indices``: per sample, None where it is not there."""

    parameter: str
    axis: int
    role: Role
    offset: float
    indices: tuple[Blocks | None, ...] = ()

    @property
    def module(self) -> str:
        return self.parameter.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.parameter.rpartition(".")[2]


@dataclass
class Seen:
    """Groups of one name over all layers and samples. ``layers``: per sample, which have it; ``groups``: per sample,
    that of the first such layer."""

    name: str
    kind: str
    layers: list[frozenset[int]] = field(default_factory=list)
    groups: list[CoupledGroup | None] = field(default_factory=list)


def declare(config: PreTrainedConfig, small: PreTrainedConfig) -> Code:
    """``coupled_groups`` and ``refresh`` for models of the class of ``config``.

    Kinds of units that the oracle refuses are left out. The code is run on every sample and must give what discovery
    gives. Raises `NoRuleError` when no code does.
    """
    from ..discovery.verify import VERIFIED, verify

    if config.get_text_config() is not config:
        raise NoRuleError("the configuration holds others inside it")
    samples = take_samples(config, small)
    richest = max(samples[1:], key=lambda s: len(s.graph.kinds))
    verdicts = [v for v in verify(None, richest.config, shrink=False) if v.verdict == VERIFIED]
    kinds = tuple(v.kind for v in verdicts)
    rules = Rules([replace(s, graph=replace(s.graph, groups=s.graph.of_kinds(kinds))) for s in samples])
    writer = Writer(rules)
    layer = list(writer.layer_groups())
    whole = list(writer.whole_groups())
    body = "\n".join([*writer.method(layer, whole), "", *refresh_method(richest, verdicts)])
    code = Code(body, _imports(body), richest.config, kinds)
    _check(code, rules)
    return code


class Writer:
    """Writes groups one by one."""

    def __init__(self, rules: Rules) -> None:
        self.rules, self.samples = rules, rules.samples
        paths = {s.graph.layers for s in self.samples}
        if len(paths) > 1:
            raise NoRuleError("the decoder layers are in different places")
        self.path = paths.pop()

    def method(self, layer: Sequence[str], whole: Sequence[str]) -> list[str]:
        count = self.rules.fit([s.graph.num_layers for s in self.samples], "the number of layers")
        inner, outer = "\n".join(layer), "\n".join(whole)
        return [
            "def coupled_groups(self, config: PreTrainedConfig) -> Sequence[CoupledGroup]:",
            "    groups = []",
            f"    for n in range({count}):",
            "        groups += self._layer(config, n)",
            *indented(self._definitions(outer)),
            *indented(whole),
            "    return groups",
            "",
            "def _layer(self, config: PreTrainedConfig, n: int) -> list[CoupledGroup]:",
            f'    at = f"{self.path}.{{n}}"',
            *indented(self._definitions(inner)),
            "    groups = []",
            *indented(layer),
            "    return groups",
        ]

    def _definitions(self, text: str) -> list[str]:
        """The local names that ``text`` uses, those first that others are made of."""
        names = self.rules.names
        used = {name for name in names if uses(text, name)}
        used |= {name for name in names if any(uses(names[other], name) for other in used)}
        return [f"{name} = {definition}" for name, definition in names.items() if name in used]

    def layer_groups(self) -> Iterator[str]:
        for seen in _collect(self.samples).values():
            text = "\n".join(self._group(seen))
            condition = self.rules.layers(seen.layers, f"{seen.name} groups")
            if condition:
                text = "\n".join([f"if {condition}:", *indented([text])])
            yield text

    def _group(self, seen: Seen) -> list[str]:
        groups, name = seen.groups, f'f"layers.{{n}}.{seen.name}"'
        patterns = list(_patterns(self.samples, groups))
        fit = self.rules.fit
        units = fit([g.units if g else None for g in groups], f"the units of {seen.name}")
        spans = self._builder(seen, patterns) or self._spans(patterns, groups)
        arguments = [name, _KINDS.get(seen.kind, f'"{seen.kind}"'), units, "spans", "layer=n"]
        lines = [f"spans = {spans}"]
        for attribute in ("blocks", "minimum", "multiple"):
            values, constant = [getattr(g, attribute) if g else None for g in groups], attribute == "multiple"
            if any(v not in (None, 1) for v in values):
                arguments.append(f"{attribute}={fit(values, f'{attribute} of {seen.name}', constant=constant)}")
        if any(g is not None and g.buffers for g in groups):
            buffers = [replace(g, spans=g.buffers, buffers=()) if g and g.buffers else None for g in groups]
            lines.append(f"buffers = {self._spans(list(_patterns(self.samples, buffers)), buffers)}")
            arguments.append("buffers=buffers")
        return [*lines, append(arguments)]

    def _builder(self, seen: Seen, patterns: Sequence[Pattern]) -> str | None:
        """A call of a builder of `layouts` that gives the same spans in every sample."""
        for name, arguments in self._candidates(seen, patterns):
            text = call(f"layouts.{name}", arguments)
            if all(
                set(self._evaluate(text, sample, g)) == set(g.spans)
                for sample, g in zip(self.samples, seen.groups, strict=True)
                if g is not None
            ):
                return text
        return None

    def _candidates(self, seen: Seen, patterns: Sequence[Pattern]) -> Iterator[tuple[str, list[str]]]:
        makers = [p for p in patterns if p.leaf == "weight" and p.role is Role.PRODUCES]
        readers = [p for p in patterns if p.role is Role.CONSUMES]
        biases = [p for p in patterns if p.leaf == "bias"]
        if len(readers) != 1 or len(makers) + len(biases) + 1 != len(patterns):
            return
        try:
            bias = self._bias(makers, biases)
            modules = [_path(p.module) for p in [*makers, *readers]]
            different = len(dict.fromkeys(modules))
            units = self.rules.fit([g.units if g else None for g in seen.groups], "units")
            if all(p.width == 1 for q in readers for p in q.indices if p):
                name = {3: "gated_mlp", 2: "packed_gated_mlp" if len(makers) == 2 else "two_layer_mlp"}.get(different)
                if name:
                    default = "True" if name == "two_layer_mlp" else "False"
                    yield name, [*dict.fromkeys(modules), units, *([f"bias={bias}"] if bias != default else [])]
                return
            yield from self._attention(seen, makers, readers[0], units, bias)
        except NoRuleError:
            return  # written out span by span instead

    def _attention(
        self, seen: Seen, makers: Sequence[Pattern], reader: Pattern, units: str, bias: str
    ) -> Iterator[tuple[str, list[str]]]:
        wide = [i.width * i.units if i else None for i in reader.indices]
        dims = [self.rules.environment(s).get("head_dim") for s in self.samples]
        heads = self.rules.fit([w // d if w and d else None for w, d in zip(wide, dims, strict=True)], "heads")
        modules = [_path(p.module) for p in [*makers, reader]]
        end = [f"bias={bias}"] if bias != "False" else []
        if len(makers) == 1:
            yield "query_heads", [*modules, heads, "head_dim", *end]
            yield "interleaved_qkv_attention", [*modules, units, "head_dim", *end]
            yield "interleaved_qkv_attention", [*modules, units, "head_dim", f"queries={heads} // {units}", *end]
        elif len(dict.fromkeys(modules)) == 2:
            yield "fused_qkv_attention", [modules[0], modules[-1], heads, units, "head_dim", *end]
        elif len(makers) == 3:
            yield "grouped_query_attention", [*modules, heads, units, "head_dim", *end]

    def _bias(self, makers: Sequence[Pattern], biases: Sequence[Pattern]) -> str:
        owners = Counter(p.module for p in biases)
        if biases and owners != Counter(p.module for p in makers):
            raise NoRuleError("some projections have a bias and some have none")
        there = {tuple(None if m is None else b is not None for m, b in zip(makers[0].indices, p.indices, strict=True))
                 for p in biases}  # fmt: skip
        if len(there) > 1:
            raise NoRuleError("biases come and go one by one")
        return self.rules.flag(there.pop(), "a bias") if there else "False"

    def _spans(self, patterns: Sequence[Pattern], groups: Sequence[CoupledGroup | None]) -> str:
        """Span by span, for layouts that no builder knows."""
        items = []
        for p in patterns:
            present = [None if g is None else i is not None for g, i in zip(groups, p.indices, strict=True)]
            condition = self.rules.flag(present, p.parameter)
            arguments = [_path(p.parameter), str(p.axis), f"Role.{p.role.name}", self._index(p)]
            text = call("Span", [*arguments, *([f"offset={p.offset}"] if p.offset else [])])
            items.append(text if condition == "True" else f"*([{text}] if {condition} else [])")
        return listed(items, "()")

    def _index(self, pattern: Pattern) -> str:
        def fit(of: Callable[[Blocks], int]) -> str:
            return self.rules.fit([of(i) if i else None for i in pattern.indices], pattern.parameter)

        units, width, start = fit(lambda i: i.units), fit(lambda i: i.width), fit(lambda i: i.start)
        arguments = [units, *([width] if width != "1" else []), *([f"start={start}"] if start != "0" else [])]
        if any(i is not None and i.stride is not None for i in pattern.indices):
            arguments.append(f"stride={fit(lambda i: i.step)}")
        return f"Blocks({', '.join(arguments)})"

    def _evaluate(self, text: str, sample: Sample, group: CoupledGroup) -> tuple[Span, ...]:
        names = {**_NAMES, **self.rules.environment(sample), "n": group.layer, "at": f"{self.path}.{group.layer}"}
        try:
            found: tuple[Span, ...] = eval(text, names)
        except ZeroDivisionError:
            return ()
        return found

    def whole_groups(self) -> Iterator[str]:
        """The groups that run through all layers, and the layers themselves."""
        names = dict.fromkeys(g.name for s in self.samples for g in s.graph.groups if g.layer is None and g.spans)
        for name in names:
            yield stream_group(self.rules, self.path, name)
        if all("layers" in s.graph.by_name for s in self.samples):
            count = self.rules.fit([s.graph.by_name["layers"].units for s in self.samples], "the number of layers")
            modules = f'modules = tuple(f"{self.path}.{{n}}" for n in range({count}))'
            yield f'{modules}\ngroups.append(CoupledGroup("layers", LAYER, {count}, modules=modules))'


def _collect(samples: Sequence[Sample]) -> dict[Any, Seen]:
    """Groups of layers by name and by the parameters they cut (biases aside), in order of appearance."""
    found: dict[Any, Seen] = {}
    for number, sample in enumerate(samples):
        here: dict[Any, list[CoupledGroup]] = {}
        for group in sample.graph.groups:
            if group.layer is not None:
                here.setdefault(_key(group, sample), []).append(group)
        for key in here:
            if key not in found:
                found[key] = Seen(key[0], key[1], [frozenset()] * number, [None] * number)
        for key, seen in found.items():
            groups = here.get(key, [])
            if len({_numbers(g, sample) for g in groups}) > 1:
                raise NoRuleError(f"{seen.name} differs in size from layer to layer")
            seen.layers.append(frozenset(g.layer for g in groups if g.layer is not None))
            seen.groups.append(groups[0] if groups else None)
    return found


def _key(group: CoupledGroup, sample: Sample) -> tuple[str, str, tuple[str, ...]]:
    path = f"{sample.graph.layers}.{group.layer}."
    weights = {s.parameter.removeprefix(path) for s in group.spans if not s.parameter.endswith("bias")}
    return group.name.removeprefix(f"layers.{group.layer}."), group.kind, tuple(sorted(weights))


def _numbers(group: CoupledGroup, sample: Sample) -> Any:
    path = f"{sample.graph.layers}.{group.layer}."
    spans = frozenset(replace(s, parameter=s.parameter.removeprefix(path)) for s in group.cut_spans)
    return group.units, group.blocks, group.minimum, group.multiple, spans


def _patterns(samples: Sequence[Sample], groups: Sequence[CoupledGroup | None]) -> Iterator[Pattern]:
    """The spans of one group side by side; several of one parameter and axis are told apart by their order."""
    found: dict[tuple[Any, int], dict[int, Blocks]] = {}
    for number, (sample, group) in enumerate(zip(samples, groups, strict=True)):
        count: Counter[Any] = Counter()
        for span in group.spans if group else ():
            path = f"{sample.graph.layers}.{group.layer}." if group else ""
            key = (span.parameter.removeprefix(path), span.axis, span.role, span.offset)
            if not isinstance(span.index, Blocks):
                raise NoRuleError(f"{span.parameter} is laid out irregularly")
            found.setdefault((key, count[key]), {})[number] = span.index
            count[key] += 1
    for (key, _), indices in found.items():
        parameter, axis, role, offset = key
        found_in = tuple(indices.get(n) for n in range(len(samples)))
        yield Pattern(parameter, axis, role, offset, found_in)


def _path(relative: str) -> str:
    return f'f"{{at}}.{relative}"'


def _imports(body: str) -> tuple[str, ...]:
    every = ("Blocks", "CoupledGroup", "Role", "Span", "layouts", *_KINDS.values())
    used = ["ModelFamily", *(name for name in every if uses(body, name))]
    return tuple(sorted(used, key=lambda n: (not n.isupper(), n.islower(), n)))


def _check(code: Code, rules: Rules) -> None:
    """Run the code on every sample, and the oracle on the small one."""
    from ..discovery.verify import VERIFIED, verify
    from ..families import ModelFamily

    names: dict[str, Any] = {**{v: k for k, v in _KINDS.items()}, **_NAMES, "CoupledGroup": CoupledGroup}
    head = ["from __future__ import annotations", "class Declared(ModelFamily):", "    name = 'declared'"]
    source = "\n".join([*head, *indented([code.source])])
    exec(source, {**names, "ModelFamily": ModelFamily, "__name__": "declared"}, names)
    family = names["Declared"]()
    for sample in rules.samples:
        declared = {g.name: g for g in family.coupled_groups(sample.config)}
        for group in sample.graph.groups:
            other = declared.pop(group.name, None)
            if other is None or (set(other.cut_spans), other.units, other.blocks, other.minimum, other.modules) != (
                set(group.cut_spans), group.units, group.blocks, group.minimum, group.modules
            ):  # fmt: skip
                raise NoRuleError(f"no rule gives group {group.name}")
        if declared:
            raise NoRuleError(f"the rules give a group {next(iter(declared))} that is not there")
    wrong = [v for v in verify(family, code.config, shrink=False) if v.verdict != VERIFIED]
    if wrong:
        raise NoRuleError(f"the written code fails for {wrong[0].kind}: {wrong[0].reason}")
