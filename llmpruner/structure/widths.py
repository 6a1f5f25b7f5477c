"""Which numbers of units a group may keep, and which groups must keep the same number. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import lcm

from .coupling import ATTENTION, EXPERT, LAYER, QUERY, VOCABULARY, CoupledGroup, CouplingGraph
from .kept import Kept, renamed

ALIGNMENT = 64
"""Default multiple of kept widths: kernels of matrix products run at full speed at multiples of 64."""
NARROW = 1024
"""Models whose hidden states have fewer channels than this are narrow: finer widths, at multiples of 32, suit them."""
FEWEST_WIDTHS = 8
"""A default multiple leaves every group at least this many widths to choose from."""
QUANTISED = 32
"""Weights of a row share a scale in blocks of 32 or more in GGUF and in torchao's int4; widths must be multiples."""
COUNTED = frozenset({ATTENTION, QUERY, LAYER, EXPERT})
"""Kinds whose units are counted: heads, layers and experts. The others are widths of matrix products."""


@dataclass(frozen=True)
class Widths:
    """``uniform``: whether groups of the same kind and size in all layers keep the same number of units, so that one
    number in a configuration describes them. ``round_to``: kept widths are multiples of it. ``adapts``: whether
    `round_to` is a default, which is halved for groups that it would leave too few widths (`FEWEST_WIDTHS`).
    ``dense``: group name → number of units in the dense model, for groups that were cut before: multiples stay those of
    the dense model in further steps and prunes."""

    uniform: bool = False
    round_to: int = 1
    adapts: bool = False
    dense: Mapping[str, int] = field(default_factory=dict)

    def multiple(self, group: CoupledGroup) -> int:
        """What the kept number of units of ``group`` must be a multiple of, including the group's own multiple."""
        units = self.dense.get(group.name, group.units)
        if group.kind == EXPERT and self.uniform:
            # At most a quarter of them, so that they can be spread evenly over as many devices (expert parallelism).
            return lcm(max(n for n in (1, 2, 4, 8) if n == 1 or 4 * n <= units), group.multiple)
        if group.kind in COUNTED:
            return group.multiple
        # The rows of an embedding and of a head are no layer's, so that free shapes need not leave them odd.
        of_tokens = group.kind == VOCABULARY
        own = max(self.round_to, ALIGNMENT) if of_tokens else self.round_to
        while (self.adapts or of_tokens) and own > 1 and units < FEWEST_WIDTHS * own:
            own //= 2
        return lcm(own, group.multiple)

    def alike(self, groups: Iterable[CoupledGroup]) -> list[list[str]]:
        """The names of the groups, those that must keep the same number of units together, in order of appearance."""
        found: dict[tuple[object, ...], list[str]] = {}
        for group in groups:
            # Equal numbers of units may be left of different ones.
            inside = self.uniform and group.layer is not None
            key = (*like(group), self.multiple(group)) if inside else (group.name,)
            found.setdefault(key, []).append(group.name)
        return list(found.values())

    def after(self, graph: CouplingGraph, kept: Kept) -> Widths:
        """The same for what is left of ``graph`` after a cut to ``kept``."""
        names = renamed(graph, kept).items()
        return replace(self, dense={new: self.dense.get(old, graph.by_name[old].units) for old, new in names})


def like(group: CoupledGroup) -> tuple[object, ...]:
    """What a group in a layer shares with the equal groups of other layers."""
    return group.in_layer(0), group.kind, group.units, group.blocks, group.multiple, group.minimum


ANY = Widths()
"""Any number of units in any group."""


def widths_for(shape: str, round_to: int | None, hidden_size: int, dense: Mapping[str, int] | None = None) -> Widths:
    """The `Widths` of ``--shape`` and ``--round-to`` (None: the default) for a model of ``hidden_size`` channels.
    ``dense``: as in `Widths`."""
    if shape == "free":
        return Widths(round_to=round_to or 1)
    # Less for models too small for any kernel to matter.
    default = ALIGNMENT if hidden_size >= NARROW else min(32, 2 ** max(0, (hidden_size // 16).bit_length() - 1))
    return Widths(uniform=True, round_to=round_to or default, adapts=round_to is None, dense=dense or {})
