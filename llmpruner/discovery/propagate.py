"""Abstract interpretation of an exported graph: which indices of which axes can only be removed together.

Every index of every parameter axis gets an identity (a number from 0), and every tensor becomes a `Value`: for each of
its axes, one identity per index. The rule of an operator gives the axes of its result, ties identities that can only be
removed together, and blocks those that can't be removed. In ``down(silu(up(x)))`` with ``up`` (3, 2), whose rows are p,
q, r, and ``down`` (2, 3), whose columns are u, v, w:

    linear(x, up)       last axis [p q r]       the columns of ``up`` are tied to the channels of x, and CONSUMED
    silu(…)             last axis [p q r]
    linear(…, down)     last axis [s t]         [u v w] is tied to [p q r], and CONSUMED

So row p of ``up`` and column u of ``down`` are one unit, which is silenced by zeros in column u. Operators that mix the
indices of an axis (a sum, a LayerNorm), or pick them by number, block them with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial, reduce
from operator import attrgetter
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import UnsupportedModelError, first_line

Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

FIXED = -1
"""Cannot be removed: a position in the batch, in time, or inside a head."""
TABLE = -2
"""An index of a computed constant (ALiBi slopes, sinusoids), which is cut with the axis that it is tied to."""
FREE = -3
"""One of any number of copies of one value."""


class Mark(str, Enum):
    """What a pass through the graph found about an identity."""

    BLOCKED = "blocked"
    CONSUMED = "consumed"
    """A weight is multiplied with an activation along it: zeros in that part of the weight silence the unit."""
    RMS = "rms"
    """It is an element of the weight of an RMS norm."""
    ATTENDS = "attends"
    """It numbers softmaxes over positions, or products of two activations: a head, of linear attention too."""
    ROUTED = "routed"
    """A top-k choice is made among these identities: experts."""
    SOFTMAX = "softmax"
    """A softmax runs over these identities; they can be removed only if a top-k choice is made among them too."""
    VOCABULARY = "vocabulary"
    """It is a token: a row that token ids look up, and a logit."""


class Origin(Enum):
    CONSTANT = "constant"
    """Depends on neither parameters nor inputs."""
    WEIGHT = "weight"
    """A parameter, perhaps transposed, viewed, sliced, or with a constant added."""
    ACTIVATION = "activation"


@dataclass(frozen=True)
class Tag:
    """A stage of a norm over ``ids``: ``square``, ``mean_square``, its ``root`` or ``inverse`` root, ``normed``."""

    stage: str
    ids: Ids


@dataclass(frozen=True)
class Value:
    """What is known of a tensor: the identities along each axis. ``origin``: None in the result of a rule, where the
    operands decide it. ``offset``: the constant added to a weight. ``selects``: for a tensor of indices, the identities
    of the axis that it indexes. ``numbers``: the values of an integer constant. ``is_input``: it is the token ids."""

    axes: tuple[Ids, ...]
    origin: Origin | None = None
    offset: float = 0.0
    selects: Ids | None = None
    tag: Tag | None = None
    numbers: Ids | None = None
    is_input: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(ids) for ids in self.axes)

    @property
    def ndim(self) -> int:
        return len(self.axes)


Rule = TypeVar("Rule", bound=Callable[..., Any])
"""Called with a `Propagation`, the node, and the operator's arguments; ``NotImplemented`` if it can't follow them."""
RULES: dict[str, Callable[..., Any]] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule for ATen operators (names without overload, ``linear`` for ``aten.linear``)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def uniform(size: int, value: int) -> Ids:
    return np.full(size, value, dtype=np.int64)


@dataclass
class Propagation:
    """One pass over a graph. ``elastic``: keys and values may be repeated fewer times, so that single query heads can
    be removed. ``parameters``: (name, axis) → identities, of parameters and of floating point ``buffers``. ``tokens``:
    identities of the vocabulary, once token ids were looked up; ``readers``: what else reads token ids. ``where``: the
    operator at work and its module. ``edges``: pairs of axes whose identities are tied. ``marked``: identities with a
    mark; there may be room for more identities than there are. ``reasons``: why identities are blocked. ``blocks``:
    identities in so many blocks that keep equally many units. ``minimum``: identities and how many must stay."""

    elastic: bool = False
    parameters: dict[tuple[str, int], Ids] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    offsets: list[tuple[Ids, float]] = field(default_factory=list)
    tokens: Ids | None = None
    readers: list[str] = field(default_factory=list)
    where: str = ""
    count: int = 0
    edges: list[tuple[Ids, Ids]] = field(default_factory=list)
    marked: dict[Mark, Flags] = field(default_factory=lambda: {mark: np.zeros(1024, dtype=bool) for mark in Mark})
    reasons: list[tuple[Ids, str]] = field(default_factory=list)
    blocks: list[tuple[Ids, int]] = field(default_factory=list)
    minimum: list[tuple[Ids, int]] = field(default_factory=list)

    def run(self, program: torch.export.ExportedProgram, ties: Mapping[str, str]) -> None:
        """Interpret ``program``. ``ties``: tied parameter → the name that it is stored under."""
        values: dict[Node, Any] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = self.input(node, program, ties)
            elif node.op == "get_attr":
                values[node] = self.opaque(attrgetter(str(node.target))(program.graph_module), Origin.CONSTANT)
            elif node.op == "output":
                logits, *others = _tensors(map_arg(node.args, values.__getitem__))
                self.predict(logits.axes[-1])
                for ids in (*logits.axes[:-1], *(ids for value in others for ids in value.axes)):
                    self.keep(ids, "it is an axis of the output")
            else:
                values[node] = self.call(node, *map_arg((node.args, node.kwargs), values.__getitem__))

    def input(self, node: Node, program: torch.export.ExportedProgram, ties: Mapping[str, str]) -> Any:
        signature, meta = program.graph_signature, cast("Any", node.meta.get("val"))
        if name := signature.inputs_to_parameters.get(node.name):
            return self.parameter(ties.get(name, name), meta.shape)
        if (buffer := signature.inputs_to_buffers.get(node.name)) and meta.is_floating_point():
            self.buffers.add(buffer)
            return replace(self.parameter(ties.get(buffer, buffer), meta.shape), origin=Origin.CONSTANT)
        if node.name in signature.user_inputs:
            return tree_map_only(Value, partial(replace, is_input=True), self.opaque(meta, Origin.ACTIVATION))
        value = self.opaque(meta, Origin.CONSTANT)
        constant = program.constants.get(signature.inputs_to_lifted_tensor_constants.get(node.name, ""))
        if isinstance(constant, torch.Tensor) and not constant.is_meta and constant.dtype is torch.long:
            return replace(value, numbers=constant.numpy())
        return value

    def parameter(self, name: str, shape: Sequence[int]) -> Value:
        for axis, size in enumerate(shape):
            if (name, axis) not in self.parameters:
                self.parameters[name, axis] = self.new(size)
        return Value(tuple(self.parameters[name, axis] for axis in range(len(shape))), Origin.WEIGHT)

    def call(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        name = operator_name(node.target)
        modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]
        self.where = f"{name} in {modules[-1] if modules else 'the model'}"
        operands = _tensors([args, kwargs])
        for value in operands:
            if value.tag and value.tag.stage != "square" and name not in KEEPS_TAG:
                self.block(value.tag.ids, "a norm without a weight of its own")
        result: Any = NotImplemented
        meta, failed = node.meta.get("val"), f"discovery cannot follow operator {self.where}"
        if name in RULES:
            try:
                result = RULES[name](self, node, *args, **kwargs)
            except Exception as error:  # a rule that meets arguments it was not written for may raise anything
                raise UnsupportedModelError(f"{failed}: {type(error).__name__}: {first_line(error)}") from error
        moved = name in READS_NO_TOKENS or (isinstance(result, Value) and result.is_input)
        if not moved and any(value.is_input for value in operands):
            self.readers.append(self.where)
        constant = all(value.origin is Origin.CONSTANT for value in operands)
        origin = Origin.CONSTANT if constant else Origin.ACTIVATION
        if result is NotImplemented:
            # The operands of constants have no identities.
            for value in operands:
                for ids in (*value.axes, *([] if value.selects is None else [value.selects])):
                    self.block(ids, f"operator {name} is not understood")
            return self.opaque(meta, origin)
        if isinstance(meta, torch.Tensor) and isinstance(result, Value) and result.shape != tuple(meta.shape):
            raise UnsupportedModelError(f"{failed}: it makes shape {tuple(meta.shape)}, and the rule {result.shape}")
        return tree_map_only(Value, lambda value: value if value.origin else replace(value, origin=origin), result)

    def opaque(self, meta: Any, origin: Origin) -> Any:
        """A value of the shape of ``meta`` whose axes have no identities."""
        if isinstance(meta, list | tuple):
            return [self.opaque(m, origin) for m in meta]
        if isinstance(meta, torch.Tensor):
            return Value(tuple(self.plain(n, origin) for n in meta.shape), origin)
        return meta

    def plain(self, size: int, origin: Origin = Origin.ACTIVATION) -> Ids:
        return uniform(size, FREE if size == 1 else TABLE if origin is Origin.CONSTANT else FIXED)

    # The building blocks of rules.

    def new(self, size: int) -> Ids:
        ids = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        if self.count > len(self.marked[Mark.BLOCKED]):
            room = np.zeros(self.count, dtype=bool)
            self.marked = {mark: np.r_[flags, room] for mark, flags in self.marked.items()}
        return ids

    def tie(self, left: Ids, right: Ids) -> Ids:
        """Index *i* of both axes can only be removed together. Returns the identities of the common axis."""
        if left is right:
            return left
        both = (left >= 0) & (right >= 0)
        if both.any():
            self.edges.append((left[both], right[both]))
        for mine, other in ((left, right), (right, left)):
            self.block(mine[other == FIXED], "tied to an axis that cannot be cut")
        known = np.where(left >= 0, left, np.where(right >= 0, right, np.maximum(left, right)))
        return np.where((left == FIXED) | (right == FIXED), FIXED, known)

    def mark(self, ids: Ids, mark: Mark) -> None:
        self.marked[mark][ids[ids >= 0]] = True

    def keep(self, ids: Ids, reason: str) -> None:
        """``ids`` cannot be removed."""
        ids = ids[ids >= 0]
        if ids.size:
            self.marked[Mark.BLOCKED][ids] = True
            self.reasons.append((ids, reason))

    def block(self, ids: Ids, reason: str) -> None:
        """``ids`` cannot be removed; ``reason``: what the operator at work does."""
        self.keep(ids, f"{reason} ({self.where})")

    def removable(self, ids: Ids) -> bool:
        """Whether some of ``ids`` are not blocked yet, ties aside."""
        ids = ids[ids >= 0]
        return bool(ids.size) and not self.marked[Mark.BLOCKED][ids].all()

    def look_up(self, rows: Ids) -> None:
        """Token ids choose ``rows`` of a table."""
        if self.tokens is None:
            self.tokens = rows
        elif rows is not self.tokens:
            self.readers.append(f"several tables ({self.where})")

    def predict(self, last: Ids) -> None:
        """``last``, the last axis of the logits, numbers the same tokens as the rows that token ids look up."""
        rows = [] if self.tokens is None else [self.tokens]
        if rows and not self.readers and len(rows[0]) == len(last):
            self.mark(self.tie(rows[0], last), Mark.VOCABULARY)
            return
        reason = f"token ids are read by {self.readers[0]}" if rows and self.readers else "an entry of the vocabulary"
        for ids in (last, *rows):
            self.keep(ids, reason)

    def broadcast(self, operands: Sequence[Value]) -> tuple[Ids, ...]:
        """Align shapes from the right, tie axes of equal size, and repeat axes of size one."""
        rank = max((v.ndim for v in operands), default=0)
        axes: list[Ids] = []
        for position in range(rank, 0, -1):
            column = [v.axes[-position] for v in operands if v.ndim >= position]
            size = next((len(c) for c in column if len(c) != 1), 1)
            for ids in column:
                if len(ids) != size:
                    self.block(ids, "broadcast")
            axes.append(reduce(self.tie, [ids for ids in column if len(ids) == size]))
        return tuple(axes)

    def contract(self, a: Ids, b: Ids, left: Value, right: Value) -> None:
        """Sum over a common axis of two operands."""
        if left.origin is Origin.WEIGHT and left.offset == 0 and right.origin is not Origin.WEIGHT:
            a, b, left, right = b, a, right, left
        self.tie(a, b)
        if right.origin is Origin.WEIGHT and right.offset == 0:
            self.mark(b, Mark.CONSUMED)
        else:
            for ids in (a, b):
                self.block(ids, "summed over in a product of two activations")

    def reduce(self, value: Value, dims: Sequence[int], keepdim: bool) -> tuple[Ids, ...]:
        """Axes after a reduction; blocks the reduced ones."""
        gone = {d % value.ndim for d in dims}
        for d in sorted(gone):
            self.block(value.axes[d], "reduced")
        axes = [uniform(1, FREE) if d in gone else ids for d, ids in enumerate(value.axes)]
        return tuple(ids for d, ids in enumerate(axes) if keepdim or d not in gone)


KEEPS_TAG: set[str] = set()
READS_NO_TOKENS = {
    "embedding", "eq", "ne", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "_assert_tensor_metadata",
}  # fmt: skip
"""Operators that look up token ids, read their shape, or compare them with a token that the configuration names."""


def with_axes(value: Value, axes: Sequence[Ids]) -> Value:
    """``value`` after an operator that only moves elements."""
    return replace(value, axes=tuple(axes), tag=None)


def operator_name(target: Any) -> str:
    if (schema := getattr(target, "_schema", None)) is None:
        return str(getattr(target, "__name__", target))
    namespace, _, name = schema.name.partition("::")
    return name if namespace == "aten" else f"{namespace}.{name}"


def _tensors(item: Any) -> list[Value]:
    return [leaf for leaf in tree_leaves(item) if isinstance(leaf, Value)]
