"""Units, spans and coupled groups: the structure of a model as plain data.

A *unit* is the smallest thing that can be removed (an MLP channel, a key/value head with its query heads, a
hidden channel, a layer). A *coupled group* is a set of units of one kind together with the *spans* they own. A span
lists which indices of one axis of one parameter each unit owns. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import pairwise
from math import prod

from ..errors import CouplingError

MLP = "mlp"
ATTENTION = "attention"
QUERY = "query"
HIDDEN = "hidden"
LAYER = "layer"
EXPERT = "expert"
VOCABULARY = "vocabulary"
LATENT = "latent"
"""Channels inside a sub-layer: the low rank of multi-head latent attention, heads of a state space model."""
KINDS = (MLP, ATTENTION, QUERY, HIDDEN, LAYER, EXPERT, VOCABULARY, LATENT)


class Role(str, Enum):
    """How the parameter of a span is used with the activations of its units."""

    PRODUCES = "produces"
    """The output axis of a projection, its bias, or the columns of an embedding; for tokens, its rows."""
    CONSUMES = "consumes"
    """The input axis of a projection."""
    NORM = "norm"
    """The weight of an RMS norm over the units (Zhang & Sennrich, 2019), ``w · x / √(mean(x²) + ε)``. With N − N' units
    silenced, the mean over the N' others is N/N' times that over all N; so cutting multiplies w by √(N/N') and ε by
    N/N', which keeps the result equal to the model with the units silenced."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Regular map: unit ``u`` owns ``width`` indices from ``start + u·stride`` on. ``stride``: None: ``width``."""

    units: int
    width: int = 1
    start: int = 0
    stride: int | None = None

    @property
    def step(self) -> int:
        """Distance between the first indices of neighbouring units."""
        return self.width if self.stride is None else self.stride

    def of(self, unit: int) -> Sequence[int]:
        """The indices of one unit."""
        first = self.start + unit * self.step
        return range(first, first + self.width)

    def __str__(self) -> str:
        stop = self.start + (self.units - 1) * self.step + self.width
        each = "" if self.width == self.step == 1 else f", {self.width} per unit"
        return f"{self.start}:{stop}{each}" + (f" every {self.step}" if self.step != self.width else "")


@dataclass(frozen=True, slots=True)
class Explicit:
    """Irregular index map: unit ``u`` owns the indices ``rows[u]``; all rows have the same length."""

    rows: tuple[tuple[int, ...], ...]

    @property
    def units(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        return len(self.rows[0]) if self.rows else 0

    def of(self, unit: int) -> Sequence[int]:
        return self.rows[unit]

    def __str__(self) -> str:
        return f"explicit, {self.width} per unit"


IndexMap = Blocks | Explicit


def index_map(rows: Sequence[Sequence[int]]) -> IndexMap:
    """The most compact map for ``rows``, the indices of each unit. `CouplingError` where they differ in length."""
    width = len(rows[0]) if rows else 0
    if any(len(row) != width for row in rows):
        raise CouplingError("every unit of a span must own the same number of indices")
    if width and all(list(row) == list(range(row[0], row[0] + width)) for row in rows):
        stride, *others = {b[0] - a[0] for a, b in pairwise(rows)} or {width}
        if not others and stride > 0:
            return Blocks(len(rows), width, rows[0][0], None if stride == width else stride)
    return Explicit(tuple(tuple(row) for row in rows))


@dataclass(frozen=True, slots=True)
class Span:
    """The indices of one axis of one parameter (or buffer) that each unit of a group owns. ``offset``: what the forward
    pass adds to the parameter before use (1.0 for Gemma's ``1 + weight`` norms); rescaling a norm needs it."""

    parameter: str
    axis: int
    role: Role
    index: IndexMap
    offset: float = 0.0

    def indices(self, units: Iterable[int]) -> list[int]:
        """The axis indices owned by ``units``, in unit order."""
        if isinstance(self.index, Blocks) and self.index.width == 1:
            # Without a call for each of what may be millions of channels.
            start, step = self.index.start, self.index.step
            return [start + unit * step for unit in units]
        return [i for u in units for i in self.index.of(u)]

    def __str__(self) -> str:
        return f"{self.parameter}[axis {self.axis}] {self.index} ({self.role.value})"


@dataclass(frozen=True)
class CoupledGroup:
    """Units of one kind that can be removed one by one, each with all parameters that must be removed with it.

    ``word``: names the group, with ``layer``, the decoder layer that all of its spans are in; None for groups across
    layers. ``kind``: the value for ``--kinds`` (`MLP`, `ATTENTION`, … or a word of your own). ``units``:
    their number; unit ``u`` of every span belongs to unit ``u`` of the others. A group of kind `LAYER` has no spans.

    ``blocks``: equal consecutive blocks of units, which must keep the same number each (query heads inside KV heads).
    ``minimum``: how many units must stay. ``multiple``: the kept number must be a multiple of it (kernels that need
    aligned rows). ``buffers``: spans of buffers with an entry for each unit (the selection bias of experts), which are
    cut, but neither scored nor counted. Raises `CouplingError` where one of these rules is broken.
    """

    word: str
    kind: str
    units: int
    spans: tuple[Span, ...] = ()
    blocks: int = 1
    minimum: int = 1
    multiple: int = 1
    buffers: tuple[Span, ...] = ()
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.units < 1:
            raise CouplingError(f"group '{self.name}' has no units")
        if bool(self.spans) == (self.kind == LAYER):
            raise CouplingError(f"group '{self.name}' must have {'no' if self.spans else 'some'} spans")
        if self.units % self.blocks:
            raise CouplingError(f"group '{self.name}': {self.units} units do not fill {self.blocks} equal blocks")
        for span in self.cut_spans:
            if (units := span.index.units) != self.units:
                raise CouplingError(f"group '{self.name}': span {span.parameter} maps {units} units, not {self.units}")

    @cached_property
    def name(self) -> str:
        """Unique in a graph, and the key of the group in plans: ``hidden``, ``layers.3.attention``."""
        return self.in_layer(self.layer)

    def in_layer(self, layer: int | None) -> str:
        """The name of this group if it were in ``layer``."""
        return self.word if layer is None else f"layers.{layer}.{self.word}"

    @cached_property
    def is_normalized(self) -> bool:
        """Whether a norm is computed over the units, so that they must be silenced where they are produced."""
        return any(s.role is Role.NORM for s in self.spans)

    @property
    def cut_spans(self) -> tuple[Span, ...]:
        """All spans: those of parameters, then those of buffers."""
        return self.spans + self.buffers

    def spans_with(self, *roles: Role) -> Iterator[Span]:
        """The spans of parameters with one of ``roles``, in order."""
        return (s for s in self.spans if s.role in roles)


@dataclass(frozen=True, slots=True)
class Blocked:
    """An axis on which discovery found no removable units. ``reason``: one line, with operator and module if known."""

    parameter: str
    axis: int
    reason: str


def layer_number(name: str, layers: str) -> int | None:
    """The number of the decoder layer that a tensor is in; None outside ``layers``, the path of their list."""
    number = name.removeprefix(f"{layers}.").partition(".")[0]
    return int(number) if number.isdecimal() and name.startswith(f"{layers}.") else None


def in_layer(path: str, layers: str, number: object) -> str:
    """The path of a module or parameter with another number of its layer; outside ``layers``, as it is."""
    old = layer_number(path, layers)
    return path if old is None else f"{layers}.{number}{path.removeprefix(f'{layers}.{old}')}"


@dataclass(frozen=True)
class CouplingGraph:
    """All coupled groups of a model, with the shapes of its tensors.

    ``shapes``: every parameter, tied ones included. ``layers``: path of the module list of decoder layers. ``ties``:
    parameter → the parameter it shares storage with. ``blocked``: axes on which discovery found no removable units.
    ``buffers``: the shapes of buffers, which are never counted. Raises `CouplingError` for two groups of one name, and
    for groups that do not fit the shapes or the layers.
    """

    groups: tuple[CoupledGroup, ...]
    shapes: Mapping[str, tuple[int, ...]]
    layers: str
    ties: Mapping[str, str] = field(default_factory=dict)
    blocked: tuple[Blocked, ...] = ()
    buffers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if clash := [name for name, n in Counter(g.name for g in self.groups).items() if n > 1]:
            raise CouplingError(f"two coupled groups are named '{clash[0]}'")
        for group in self.groups:
            for span in group.spans:
                self._check(group, span, self.shapes, "parameter")
            for span in group.buffers:
                self._check(group, span, self.buffers, "buffer")
            if group.kind == LAYER and group.units != self.num_layers:
                raise CouplingError(f"group '{group.name}' has {group.units} layers, and the decoder {self.num_layers}")
            layers = {self.layer_of(span.parameter) for span in group.spans}
            layer = layers.pop() if len(layers) == 1 else None
            if layer != group.layer:
                where = "not in one layer alone" if layer is None else f"in layer {layer}"
                raise CouplingError(f"group '{group.name}' is {where}: give it layer={layer}, not {group.layer}")

    def _check(self, group: CoupledGroup, span: Span, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
        shape, name = shapes.get(span.parameter), f"group '{group.name}'"
        if shape is None:
            raise CouplingError(f"{name}: the model has no {what} '{span.parameter}'")
        if not 0 <= span.axis < len(shape):
            raise CouplingError(f"{name}: {span.parameter} {shape} has no axis {span.axis}")
        # Of blocks that do not overlap, the first and the last are enough: checking millions of indices is slow.
        disjoint = isinstance(span.index, Blocks) and span.index.step >= span.index.width
        owned = span.indices({0, group.units - 1} if disjoint else range(group.units))
        size = shape[span.axis]
        if min(owned) < 0 or max(owned) >= size:
            raise CouplingError(f"{name}: span {span} reaches index {max(owned)}, outside the axis of size {size}")
        if len(set(owned)) != len(owned):
            raise CouplingError(f"{name}: span {span} gives one index to two units")

    @cached_property
    def by_name(self) -> Mapping[str, CoupledGroup]:
        return {g.name: g for g in self.groups}

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Kinds in order of first appearance."""
        return tuple(dict.fromkeys(g.kind for g in self.groups))

    @cached_property
    def num_layers(self) -> int:
        return 1 + max(n for p in self.shapes if (n := self.layer_of(p)) is not None)

    def of_kinds(self, kinds: Iterable[str]) -> tuple[CoupledGroup, ...]:
        """The groups of these kinds, in order."""
        wanted = set(kinds)
        return tuple(g for g in self.groups if g.kind in wanted)

    def is_decoder(self, parameter: str) -> bool:
        return parameter.startswith(self.layers + ".")

    def layer_of(self, parameter: str) -> int | None:
        """Number of the decoder layer that a parameter is in; None outside the decoder layers."""
        return layer_number(parameter, self.layers)

    @cached_property
    def total_parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(prod(s) for p, s in self.shapes.items() if p not in self.ties)

    @cached_property
    def decoder_parameters(self) -> int:
        """Number of parameters in the decoder layers, tied ones once."""
        return sum(prod(s) for p, s in self.shapes.items() if self.is_decoder(p) and p not in self.ties)

    def parameters_per_unit(self, group: CoupledGroup) -> int:
        """Number of parameters that removing one unit alone removes (for layers, the mean over units)."""
        if group.kind == LAYER:
            return self.decoder_parameters // group.units
        spans = ((s, self.shapes[s.parameter]) for s in group.spans if s.parameter not in self.ties)
        return sum(span.index.width * prod(shape) // shape[span.axis] for span, shape in spans)
