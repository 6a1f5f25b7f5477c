"""Rules for operators that rearrange elements: views, slices, concatenations, repetitions, indexing.

A view of 12 channels as 3 heads of 4 ties every four identities into one unit on the axis of heads; the axis inside a
head is `FIXED`. Flattened again, the axis is p p p p q q q q r r r r: each unit owns four indices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from math import prod
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from .propagate import FIXED, FREE, Ids, Origin, Propagation, Value, operator_name, rule, uniform, with_axes

VIEWS = frozenset(
    ("select", "slice", "view", "transpose", "permute", "unsqueeze", "squeeze", "expand", "split", "unbind", "alias",
     "getitem", "chunk", "split_with_sizes", "tensor_split")
)  # fmt: skip
"""Operators whose result shares memory with their first argument."""


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str, default: Any = None) -> Any:
    """An argument that may be given by position or by name."""
    return kwargs.get(name, args[position] if len(args) > position else default)


def regroup(
    run: Propagation, axes: Sequence[Ids], shape: Sequence[int], picked: frozenset[int] = frozenset()
) -> list[Ids]:
    """Axes after a view to ``shape``: the shortest runs of axes of equal size are merged, then split."""
    result: list[Ids] = []
    rest, sizes = list(axes), list(shape)
    while rest or sizes:
        left, right = rest[:1], sizes[:1]
        del rest[:1], sizes[:1]
        while (size := prod(map(len, left))) != prod(right):
            if size < prod(right):
                left.append(rest.pop(0))
            else:
                right.append(sizes.pop(0))
        if len(left) == 1 and len(right) == 1:
            result.append(left[0])
        else:
            first = len(result)
            result += split(run, merge(run, left), right, frozenset(n - first for n in picked))
    return result


def merge(run: Propagation, axes: Sequence[Ids]) -> Ids:
    """One axis from several, row-major. Only one of them can keep its identities."""
    wide = [ids for ids in axes if len(ids) > 1] or [*axes[:1]] or [uniform(1, FREE)]
    if len(wide) == 1:
        return wide[0]
    size = prod(len(ids) for ids in wide)
    if run.elastic and (wide[0] != FREE).any() and all((ids == FREE).all() for ids in wide[1:]):
        # Keys and values, repeated for the query heads that share them, or the choice of a group of experts, for its
        # members: copies may be removed as long as all are repeated equally often.
        fresh = run.new(size)
        run.blocks.append((fresh, len(wide[0])))
        return fresh
    known = [n for n, ids in enumerate(wide) if (ids >= 0).any()]
    if not known:
        return uniform(size, max(int(np.max(ids)) for ids in wide))
    # An axis that is blocked already, such as that of samples in a tensor written in parts, must not block the others.
    known = [n for n in known if run.removable(wide[n])] or known
    chosen = known[0]
    for other in known[1:]:
        run.block(wide[other], "merged with another axis that can be cut")
    before, after = prod(len(i) for i in wide[:chosen]), prod(len(i) for i in wide[chosen + 1 :])
    return np.tile(np.repeat(wide[chosen], after), before)


def split(run: Propagation, ids: Ids, shape: Sequence[int], picked: frozenset[int] = frozenset()) -> list[Ids]:
    """Several axes from one. The identities go to the axis that they vary along, or else to the outermost one that is
    not ``picked`` from by position (gate and up projection in one matrix); its slices become one unit each."""
    wide = [n for n, size in enumerate(shape) if size > 1]
    if not wide:
        return [ids, *(uniform(size, FREE) for size in shape[1:])] if shape else []
    if (ids < 0).all():
        return [uniform(size, int(np.max(ids)) if size > 1 else FREE) for size in shape]
    grid = ids.reshape(shape)
    rows = {n: np.moveaxis(grid, n, 0).reshape(shape[n], -1) for n in wide}
    along = [n for n in wide if (rows[n] == rows[n][:, :1]).all()]
    chosen = (along or [n for n in wide if n not in picked] or wide)[0]
    axes = [uniform(size, FIXED if size > 1 else FREE) for size in shape]
    axes[chosen] = reduce(run.tie, rows[chosen].T)
    return axes


@rule("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "squeeze")
def view(run: Propagation, node: Node, value: Value, *_: Any) -> Value:
    shape = [int(n) for n in node.meta["val"].shape]
    if list(value.shape) == shape:
        return with_axes(value, value.axes)
    ranks = [operator_name(user.target) == "topk" and user.args[2:3] in ((), (-1,)) for user in node.users]
    if run.elastic and len(shape) > 2 and prod(shape[-2:]) == value.shape[-1] and ranks and all(ranks):
        # Groups of experts, scored by their best members (DeepSeek-V3, arXiv:2412.19437, section 2.1.2): members may go
        # as long as all groups keep the same number.
        run.blocks.append((value.axes[-1], shape[-2]))
        axes = [*regroup(run, value.axes[:-1], shape[:-2]), uniform(shape[-2], FIXED), uniform(shape[-1], FREE)]
        return with_axes(value, axes)
    return with_axes(value, regroup(run, value.axes, shape, _picked(node, len(shape))))


def _picked(node: Node, rank: int) -> frozenset[int]:
    """The axes of a view of which single indices are picked by position, if nothing else uses it."""
    users: list[Any] = list(node.users)
    if any(operator_name(user.target) not in ("select", "unbind") for user in users):
        return frozenset()
    return frozenset(argument(user.args, {}, 1, "dim", 0) % rank for user in users)


@rule("transpose", "t", "numpy_T", "permute", "movedim", "unsqueeze")
def reorder(run: Propagation, node: Node, value: Value, *args: Any) -> Value:
    """On a tensor with other sizes, all different, the shape of the result tells where each axis went."""
    operator: Any = node.target
    sizes = operator(torch.empty([2 + n for n in range(value.ndim)], device="meta"), *args).shape
    return with_axes(value, [uniform(1, FREE) if size == 1 else value.axes[size - 2] for size in sizes])


@rule("expand", "expand_as", "broadcast_to")
def expand(run: Propagation, node: Node, value: Value, *_: Any, **__: Any) -> Value:
    shape = tuple(node.meta["val"].shape)
    axes = [uniform(n, FREE) for n in shape[: len(shape) - value.ndim]]
    for ids, size in zip(value.axes, shape[len(shape) - value.ndim :], strict=True):
        axes.append(ids if len(ids) == size else np.repeat(ids, size) if ids[0] >= 0 else uniform(size, FREE))
    return with_axes(value, axes)


@rule("repeat")
def repeat(run: Propagation, node: Node, value: Value, times: list[int]) -> Value:
    axes = []
    for ids, n in zip([uniform(1, FREE)] * (len(times) - value.ndim) + list(value.axes), times, strict=True):
        copies = n > 1 and len(ids) == 1 and ids[0] < 0
        axes.append(uniform(n, FREE) if copies else np.tile(ids, n))
    return with_axes(value, axes)


@rule("repeat_interleave")
def repeat_interleave(
    run: Propagation, node: Node, value: Value, times: Any = None, dim: int | None = None, **_: Any
) -> Any:
    if not isinstance(times, int) or dim is None:
        return NotImplemented
    axes = list(value.axes)
    axes[dim] = merge(run, [axes[dim], uniform(times, FREE)])
    return with_axes(value, axes)


@rule("cat", "concat", "concatenate")
def cat(run: Propagation, node: Node, tensors: list[Value], dim: int = 0) -> Value:
    parts = [v for v in tensors if v.shape != (0,)]
    dim %= parts[0].ndim
    columns = list(zip(*(part.axes for part in parts), strict=True))
    axes = [np.concatenate(column) if d == dim else reduce(run.tie, column) for d, column in enumerate(columns)]
    return Value(tuple(axes), _common_origin(parts))


@rule("stack")
def stack(run: Propagation, node: Node, parts: list[Value], dim: int = 0) -> Value:
    axes = [reduce(run.tie, column) for column in zip(*(part.axes for part in parts), strict=True)]
    axes.insert(dim % (len(axes) + 1), uniform(len(parts), FIXED if len(parts) > 1 else FREE))
    return Value(tuple(axes), _common_origin(parts))


def _common_origin(parts: Sequence[Value]) -> Origin | None:
    return Origin.WEIGHT if all(p.origin is Origin.WEIGHT and p.offset == 0 for p in parts) else None


@rule("slice", "split", "split_with_sizes", "tensor_split", "chunk")
def part(run: Propagation, node: Node, value: Value, *args: Any) -> Any:
    """The operator itself, on a range of numbers, tells which positions each part has."""
    operator: Any = node.target
    is_slice = operator_name(operator) == "slice"
    at = 0 if is_slice else 1
    dim = argument(args, {}, at, "dim", 0) % value.ndim
    positions = operator(torch.arange(value.shape[dim]), *args[:at], 0, *args[at + 1 :])
    ids = [value.axes[dim][chosen.numpy()] for chosen in ([positions] if is_slice else positions)]
    parts = [with_axes(value, (*value.axes[:dim], chosen, *value.axes[dim + 1 :])) for chosen in ids]
    return parts[0] if is_slice else parts


@rule("select", "unbind")
def pick(run: Propagation, node: Node, value: Value, dim: int = 0, *_: Any) -> Any:
    dim %= value.ndim
    picked = value.axes[dim]
    if len(picked) > 1:
        run.block(picked, "one index is picked by its position")
    rest = with_axes(value, [ids for d, ids in enumerate(value.axes) if d != dim])
    return rest if operator_name(node.target) == "select" else [rest] * len(picked)


@rule("getitem")
def getitem(run: Propagation, node: Node, values: Any, index: int) -> Any:
    return values[index]


@rule("pad")
def pad(run: Propagation, node: Node, value: Value, amounts: list[int], *_: Any) -> Value:
    axes = list(value.axes)
    for n, amount in enumerate(zip(amounts[::2], amounts[1::2], strict=True), start=1):
        if any(amount):
            run.block(axes[-n], "padded")
            axes[-n] = uniform(len(axes[-n]) + sum(amount), FIXED)
    return Value(tuple(axes))


@rule("tril", "triu")
def triangle(run: Propagation, node: Node, value: Value, *_: Any) -> Value:
    for ids in value.axes[-2:]:
        run.block(ids, "masked by position")
    return Value((*value.axes[:-2], *(run.plain(len(ids)) for ids in value.axes[-2:])), value.origin)


@rule("index")
def index(run: Propagation, node: Node, value: Value, chosen: Sequence[Value | None]) -> Value:
    picks = {dim: pick for dim, pick in enumerate(chosen) if pick is not None}
    if len(picks) == 1:
        ((dim, only),) = picks.items()
        if only.numbers is not None and only.numbers.ndim == 1:
            return with_axes(value, [ids[only.numbers] if d == dim else ids for d, ids in enumerate(value.axes)])
    for dim, pick in picks.items():
        pick_from(run, value.axes[dim], pick)
    axes = [ids for dim, ids in enumerate(value.axes) if dim not in picks]
    at = min(picks) if max(picks) - min(picks) + 1 == len(picks) else 0  # 0: they are not adjacent
    axes[at:at] = run.broadcast(list(picks.values()))
    return replace(with_axes(value, axes), selects=value.selects)


def pick_from(run: Propagation, ids: Ids, pick: Value) -> None:
    """``pick`` chooses from the axis ``ids``: tied where it numbers the same units, else the axis is blocked."""
    if pick.selects is not None and len(pick.selects) == len(ids):
        run.tie(ids, pick.selects)
    else:
        run.block(ids, "indexed by computed positions")


@rule("index_select")
def index_select(run: Propagation, node: Node, value: Value, dim: int, pick: Value) -> Value:
    return index(run, node, value, [*[None] * (dim % value.ndim), pick])


@rule("gather")
def gather(run: Propagation, node: Node, value: Value, dim: int, pick: Value, **_: Any) -> Value:
    dim %= value.ndim
    pick_from(run, value.axes[dim], pick)
    pairs = enumerate(zip(pick.axes, value.axes, strict=True))
    return Value(tuple(run.tie(a, b) if d != dim and len(a) == len(b) else a for d, (a, b) in pairs))


@rule("embedding")
def embedding(run: Propagation, node: Node, table: Value, pick: Value, *_: Any) -> Value:
    if pick.is_input:
        run.look_up(table.axes[0])
    elif pick.selects is not None:
        run.tie(table.axes[0], pick.selects)
    else:
        run.keep(table.axes[0], "rows are looked up by number")
    return Value((*pick.axes, table.axes[1]))


@rule("one_hot")
def one_hot(run: Propagation, node: Node, pick: Value, *_: Any) -> Value:
    size = int(node.meta["val"].shape[-1])
    if pick.selects is not None and len(pick.selects) == size:
        return Value((*pick.axes, pick.selects))
    if pick.selects is not None:
        run.block(pick.selects, "numbered otherwise")
    return Value((*pick.axes, uniform(size, FIXED)))


@rule("scatter")
def scatter(run: Propagation, node: Node, value: Value, dim: int, pick: Value, *_: Any, **__: Any) -> Value:
    pick_from(run, value.axes[dim], pick)
    return Value(value.axes)
