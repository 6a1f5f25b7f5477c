"""Numbers of a model's structure as expressions of its configuration, fitted to several small models at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from operator import add, floordiv, mul
from typing import TYPE_CHECKING, Any

from ..coupling import CouplingGraph
from ..errors import UnsupportedModelError
from .source import literal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LOCALS = {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
"""Local name in the written code → attribute of the configuration."""
_FIRST = ("hidden_size", "intermediate_size")
_SIZES = re.compile(r"heads|dim$|size$|rank$|groups?$|experts|n_embd|n_inner|per_tok|top_?k|layers$")
_NO_SIZES = re.compile(r"token|_id$|position|vocab|version|window")
_SMALL = 8

Values = tuple[int, ...]


class NoRuleError(UnsupportedModelError):
    """The structure is not a plain function of the configuration, so that it cannot be written out."""

    def __init__(self, what: str) -> None:
        super().__init__(f"--spans: {what}; leave --spans out, discovery does the same at run time")


@dataclass(frozen=True)
class Sample:
    """One configuration and what discovery finds in it."""

    config: PreTrainedConfig
    graph: CouplingGraph


def take_samples(config: PreTrainedConfig, small: PreTrainedConfig) -> tuple[Sample, ...]:
    """The model itself and small relatives: other numbers of heads, and every bias that a flag switches.

    What a relative cannot be built with is left out: it then has one witness fewer.
    """
    from ..discovery import discover_graph
    from ..discovery.tiny import tiny_config

    samples = [Sample(config, discover_graph(config)), Sample(small, discover_graph(small))]
    for other in (lambda: tiny_config(config, heads=(4, 2)), *_relatives(small)):
        try:
            relative = other()
            samples.append(Sample(relative, discover_graph(relative)))
        except UnsupportedModelError:
            continue
    return tuple(samples)


def _relatives(small: PreTrainedConfig) -> Iterator[Callable[[], PreTrainedConfig]]:
    values = small.to_dict()
    for name, value in values.items():
        if isinstance(value, bool) and "bias" in name:
            yield _changed(small, {name: not value})
    heads, kv_heads = (_size(small, name) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads and "num_key_value_heads" in values:
        head_dim = _size(small, "head_dim") or small.hidden_size // heads
        other = 2 if kv_heads == heads else 6
        names = {"num_attention_heads": 6, "num_key_value_heads": other, "hidden_size": 6 * head_dim}
        yield _changed(small, {small.attribute_map.get(name, name): value for name, value in names.items()})


def _changed(config: PreTrainedConfig, changes: Mapping[str, Any]) -> Callable[[], PreTrainedConfig]:
    def make() -> PreTrainedConfig:
        try:
            made: PreTrainedConfig = type(config).from_dict({**config.to_dict(), **changes})
        except Exception as error:  # third-party constructors raise anything
            raise UnsupportedModelError(f"{sorted(changes)} cannot be changed: {error}") from error
        return made

    return make


def _size(config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    return value if type(value) is int and value > 0 else 0


@dataclass(frozen=True)
class Term:
    """Source with its value in every sample. ``level``: 0 an atom, 1 a product, 2 a sum."""

    text: str
    values: Values
    level: int = 0

    def within(self, level: int) -> str:
        return f"({self.text})" if self.level > level else self.text


class Rules:
    """Finds the shortest expression that is right in all samples."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = tuple(samples)

    @cached_property
    def names(self) -> dict[str, str]:
        """Local name → its definition."""
        found = {}
        for local, attribute in _LOCALS.items():
            if all(_size(s.config, attribute) for s in self.samples):
                found[local] = f"config.{attribute}"
        if "head_dim" not in found and "heads" in found and all(_size(s.config, "hidden_size") for s in self.samples):
            found["head_dim"] = "config.hidden_size // heads"
        return found

    def environment(self, sample: Sample) -> dict[str, Any]:
        values: dict[str, Any] = {"config": sample.config}
        for name, definition in self.names.items():
            values[name] = self.value(definition, values)
        return values

    @staticmethod
    def value(source: str, names: Mapping[str, Any]) -> Any:
        """Evaluate source that was written here, never anybody else's."""
        return eval(source, {}, dict(names))

    @cached_property
    def atoms(self) -> tuple[Term, ...]:
        environments = [self.environment(s) for s in self.samples]
        terms = [Term(name, tuple(e[name] for e in environments)) for name in self.names]
        taken = set(self.names.values())
        shared = set.intersection(*({n for n in s.config.to_dict() if _size(s.config, n)} for s in self.samples))
        mapped = {own: meaning for s in self.samples for meaning, own in s.config.attribute_map.items()}
        sizes = {mapped.get(name, name) for name in shared if not _NO_SIZES.search(name)}
        every = dict.fromkeys([*_FIRST, *sorted(sizes)])
        for name in every:
            values = tuple(_size(s.config, name) for s in self.samples)
            if all(values) and f"config.{name}" not in taken:
                terms.append(Term(f"config.{name}", values))
        return tuple(terms)

    def fit(self, values: Sequence[int | None], what: str, *, constant: bool = False) -> str:
        """Source for ``values`` (None: any). ``constant``: rather the number itself, where it is always the same.
        Raises `NoRuleError` naming ``what``."""
        known = {v for v in values if v is not None}
        if known <= {0} or known == {1} or (constant and len(known) == 1):
            return str(known.pop() if known else 0)
        for term in self._terms():
            if all(v is None or v == found for v, found in zip(values, term.values, strict=True)):
                return term.text
        if len(known) == 1 and max(known) <= _SMALL:
            return str(known.pop())
        raise NoRuleError(f"{what} ({sorted(known)}) is no simple function of the configuration")

    def _terms(self) -> Iterator[Term]:
        yield from self.atoms
        core = [t for t in self.atoms if _SIZES.search(t.text) or not t.text.startswith("config.")]
        for factor, term in product((2, 3, 4), core):
            yield Term(f"{factor} * {term.text}", tuple(factor * v for v in term.values), 1)
        pairs = [*_pairs(core, core, "//", floordiv), *_pairs(core, core, "*", mul)]
        yield from pairs
        for term in core:
            yield Term(f"{term.text} + 1", tuple(v + 1 for v in term.values), 2)
        small = [t for t in core if not t.text.startswith("config.")]
        sums = [*_pairs(small, small, "+", add), *self._counts(small)]
        yield from _pairs(pairs, core, "*", mul)
        yield from _pairs(sums, small, "*", mul)

    @staticmethod
    def _counts(small: Sequence[Term]) -> Iterator[Term]:
        """Projections per head as interleaved ones pack them, and heads before the values in fused ones."""
        for number in (1, 2):
            for term in [*small, *_pairs(small, small, "//", floordiv)]:
                yield Term(f"{term.text} + {number}", tuple(v + number for v in term.values), 2)
        twice = [Term(f"2 * {t.text}", tuple(2 * v for v in t.values), 1) for t in small]
        yield from _pairs(small, twice, "+", add)

    def flag(self, values: Sequence[bool | None], what: str) -> str:
        """Source of a condition that is true where ``values`` are (None: any)."""
        known = {v for v in values if v is not None}
        if len(known) == 1:
            return str(known.pop())
        for text in self._conditions():
            found = [bool(self.value(text, self.environment(s))) for s in self.samples]
            if all(v is None or v == f for v, f in zip(values, found, strict=True)):
                return text
        raise NoRuleError(f"nothing in the configuration says when there is {what}")

    def _conditions(self) -> Iterator[str]:
        if {"heads", "kv_heads"} <= self.names.keys():
            yield "heads > kv_heads"
        flags = [n for n, v in self.samples[0].config.to_dict().items() if isinstance(v, bool)]
        flags = [n for n in flags if all(isinstance(getattr(s.config, n, None), bool) for s in self.samples)]
        for name in sorted(flags, key=lambda n: "bias" not in n):
            yield f"config.{name}"
            yield f"not config.{name}"

    def layers(self, present: Sequence[frozenset[int]], what: str) -> str:
        """Source of a condition on the layer number ``n``; "" where it always holds."""
        counts = [s.graph.num_layers for s in self.samples]
        if all(set(range(c)) == p for p, c in zip(present, counts, strict=True)):
            return ""
        if all(p in (frozenset(), frozenset(range(c))) for p, c in zip(present, counts, strict=True)):
            return self.flag([bool(p) for p in present], what)
        for text in self._layer_conditions(present):
            if all(
                {n for n in range(c) if self.value(text, {**self.environment(s), "n": n})} == p
                for s, p, c in zip(self.samples, present, counts, strict=True)
            ):
                return text
        raise NoRuleError(f"nothing in the configuration says which layers have {what}")

    def _layer_conditions(self, present: Sequence[frozenset[int]]) -> Iterator[str]:
        """What the layers that have it share in a list of the configuration, or a layer number that bounds them."""
        for name, value in self.samples[0].config.to_dict().items():
            columns = [getattr(s.config, name, None) for s in self.samples]
            lengths = [s.graph.num_layers for s in self.samples]
            if isinstance(value, list) and all(
                isinstance(column, list) and len(column) == n for column, n in zip(columns, lengths, strict=True)
            ):
                shared = {literal(c[n]) for c, layers in zip(columns, present, strict=True) if c for n in layers}
                one = shared.pop() if len(shared) == 1 else None
                yield f"config.{name}[n] == {one}" if one else f"config.{name}[n] in ({', '.join(sorted(shared))})"
        for term in self.atoms:
            yield f"n < {term.text}"
            yield f"n >= {term.text}"


def _pairs(
    left: Sequence[Term], right: Sequence[Term], sign: str, operation: Callable[[int, int], int]
) -> Iterator[Term]:
    level = 2 if sign == "+" else 1
    for a, b in product(left, right):
        if sign == "//" and any(x % y for x, y in zip(a.values, b.values, strict=True)):
            continue
        values = tuple(operation(x, y) for x, y in zip(a.values, b.values, strict=True))
        yield Term(f"{a.within(level)} {sign} {b.within(0 if sign == '//' else level)}", values, level)
