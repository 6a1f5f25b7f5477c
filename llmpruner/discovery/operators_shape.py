"""Rules for operators that rearrange elements: views, slices, concatenations, repetitions, indexing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from torch.fx import Node

from .ids import FIXED, FREE, Ids
from .propagate import Origin, Propagation, Value, operator_name, rule, uniform, with_axes

VIEWS = frozenset(
    ("select", "slice", "narrow", "view", "transpose", "permute", "unsqueeze", "squeeze", "expand", "split", "unbind",
     "alias", "getitem", "t", "swapaxes", "movedim", "chunk", "split_with_sizes")
)  # fmt: skip
"""Operators whose result shares memory with their first argument."""


def regroup(
    run: Propagation, axes: Sequence[Ids], shape: Sequence[int], picked: frozenset[int] = frozenset()
) -> list[Ids]:
    """Axes after a view to ``shape``: the shortest runs of axes with equal products are merged, then split (with
    ``picked`` as in `split`)."""
    result: list[Ids] = []
    i = j = 0
    while i < len(axes) or j < len(shape):
        left, right = [axes[i]] if i < len(axes) else [], [shape[j]] if j < len(shape) else []
        i, j = i + len(left), j + len(right)
        while prod(len(a) for a in left) != prod(right):
            if prod(len(a) for a in left) < prod(right):
                left.append(axes[i])
                i += 1
            else:
                right.append(shape[j])
                j += 1
        # Axes of size one at the end of a run belong to it.
        if len(left) == 1 and len(right) == 1:
            result.append(left[0])
        else:
            first = len(result)
            result += split(run, merge(run, left), right, frozenset(n - first for n in picked))
    return result


def merge(run: Propagation, axes: Sequence[Ids]) -> Ids:
    """One axis from several, row-major. Only one of them can keep its identities."""
    wide = [ids for ids in axes if len(ids) > 1] or list(axes[:1])
    if len(wide) <= 1:
        return wide[0] if wide else uniform(1, FREE)
    size = prod(len(ids) for ids in wide)
    if run.policy.elastic and (wide[0] != FREE).any() and all((ids == FREE).all() for ids in wide[1:]):
        # Keys and values repeated for the query heads that share them, or the choice of a group of experts repeated
        # for its members: a copy may be removed as long as each of them is repeated equally often.
        fresh = run.ids.new(size)
        run.ids.need_equal_blocks(fresh, len(wide[0]))
        return fresh
    known = [n for n, ids in enumerate(wide) if (ids >= 0).any()]
    if not known:
        return uniform(size, max(int(np.max(ids)) for ids in wide))
    # An axis that is blocked already, such as that of samples in a tensor written in parts, must not block the others.
    known = [n for n in known if run.ids.removable(wide[n])] or known
    chosen = known[0]
    for other in known[1:]:
        run.ids.block(wide[other], f"merged with another axis that can be cut ({run.where})")
    before, after = prod(len(i) for i in wide[:chosen]), prod(len(i) for i in wide[chosen + 1 :])
    return np.tile(np.repeat(wide[chosen], after), before)


def split(run: Propagation, ids: Ids, shape: Sequence[int], picked: frozenset[int] = frozenset()) -> list[Ids]:
    """Several axes from one. The identities stay on the one axis that they vary along already, or else on the
    outermost one that is not ``picked``: indexed by position, so that its size must stay (gate and up projection, or
    experts, in one matrix). The slices of that axis are then tied into one unit each."""
    wide = [n for n, size in enumerate(shape) if size > 1]
    axes = [uniform(size, FREE) for size in shape]
    if not wide:
        if axes:
            axes[0] = ids
        return axes
    if (ids < 0).all():
        for n in wide:
            axes[n] = uniform(shape[n], int(np.max(ids)))
        return axes
    grid = ids.reshape(shape)
    rows = {n: np.moveaxis(grid, n, 0).reshape(shape[n], -1) for n in wide}
    along = [n for n in wide if (rows[n] == rows[n][:, :1]).all()]
    chosen = (along or [n for n in wide if n not in picked] or wide)[0]
    block = rows[chosen]
    unit = block[:, 0]
    for column in block.T[1:]:
        unit = run.tie(unit, column)
    for n in wide:
        axes[n] = unit if n == chosen else uniform(shape[n], FIXED)
    return axes


def _dim(value: Value, dim: int, extra: int = 0) -> int:
    return dim % (value.ndim + extra)


@rule("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten")
def view(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = args[0]
    shape = [int(n) for n in node.meta["val"].shape]
    if list(value.shape) == shape:
        return with_axes(value, value.axes)
    if run.policy.elastic and len(shape) > 2 and prod(shape[-2:]) == value.shape[-1] and _are_ranked(node):
        # Groups of experts, scored by their best members (DeepSeek-V3, arXiv:2412.19437, section 2.1.2): members may be
        # removed as long as all groups keep the same number.
        run.ids.need_equal_blocks(value.axes[-1], shape[-2])
        axes = [*regroup(run, value.axes[:-1], shape[:-2]), uniform(shape[-2], FIXED), uniform(shape[-1], FREE)]
        return with_axes(value, axes)
    return with_axes(value, regroup(run, value.axes, shape, _picked(node, len(shape))))


def _picked(node: Node, rank: int) -> frozenset[int]:
    """The axes of a view of which single indices are picked by their position and by no other use."""
    names = [(operator_name(user.target), user.args) for user in node.users]
    if not names or any(name not in ("select", "unbind") for name, _ in names):
        return frozenset()
    dims: list[Any] = [args[1] if len(args) > 1 else 0 for _, args in names]
    return frozenset(dim % rank for dim in dims)


def _are_ranked(node: Node) -> bool:
    """Whether a view is used for top-k choices along its last axis and nothing else."""
    users = list(node.users)
    return bool(users) and all(operator_name(u.target) == "topk" and u.args[2:3] in ((), (-1,)) for u in users)


@rule("transpose", "swapaxes")
def transpose(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    axes = list(args[0].axes)
    a, b = _dim(args[0], args[1]), _dim(args[0], args[2])
    axes[a], axes[b] = axes[b], axes[a]
    return with_axes(args[0], axes)


@rule("t", "numpy_T")
def t(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return with_axes(args[0], args[0].axes[::-1])


@rule("permute")
def permute(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return with_axes(args[0], [args[0].axes[d] for d in args[1]])


@rule("movedim")
def movedim(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    sources = args[1] if isinstance(args[1], list) else [args[1]]
    targets = args[2] if isinstance(args[2], list) else [args[2]]
    order = np.moveaxis(np.empty([1 + n for n in range(args[0].ndim)]), sources, targets).shape
    return with_axes(args[0], [args[0].axes[n - 1] for n in order])


@rule("unsqueeze")
def unsqueeze(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    axes = list(args[0].axes)
    axes.insert(_dim(args[0], args[1], 1), uniform(1, FREE))
    return with_axes(args[0], axes)


@rule("squeeze")
def squeeze(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = args[0]
    dims = range(value.ndim) if len(args) < 2 else args[1] if isinstance(args[1], list) else [args[1]]
    gone = {_dim(value, d) for d in dims if len(value.axes[d]) == 1}
    return with_axes(value, [a for n, a in enumerate(value.axes) if n not in gone])


@rule("expand", "expand_as", "broadcast_to")
def expand(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value, shape = args[0], tuple(node.meta["val"].shape)
    axes: list[Ids] = [uniform(n, FREE) for n in shape[: len(shape) - value.ndim]]
    for ids, size in zip(value.axes, shape[len(shape) - value.ndim :], strict=True):
        if len(ids) == size:
            axes.append(ids)
        else:
            axes.append(np.repeat(ids, size) if ids[0] >= 0 else uniform(size, FREE))
    return with_axes(value, axes)


@rule("repeat", "tile")
def repeat(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value, times = args[0], list(args[1])
    axes = [uniform(1, FREE)] * (len(times) - value.ndim) + list(value.axes)
    times = [1] * (len(axes) - len(times)) + times
    result = []
    for ids, n in zip(axes, times, strict=True):
        copies = n > 1 and len(ids) == 1 and ids[0] < 0
        result.append(uniform(n, FREE) if copies else np.tile(ids, n))
    return with_axes(value, result)


@rule("repeat_interleave")
def repeat_interleave(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value, times = args[0], args[1]
    dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
    if not isinstance(times, int) or dim is None:
        result: Value = run.unknown_operator(node, "repeat_interleave", args, kwargs)
        return result
    axes = list(value.axes)
    d = _dim(value, dim)
    axes[d] = merge(run, [axes[d], uniform(times, FREE)]) if times > 1 else axes[d]
    return with_axes(value, axes)


@rule("cat", "concat", "concatenate")
def cat(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    parts: list[Value] = [v for v in args[0] if v.shape != (0,)]
    dim = _dim(parts[0], kwargs.get("dim", args[1] if len(args) > 1 else 0))
    axes = []
    for d in range(parts[0].ndim):
        column = [p.axes[d] for p in parts]
        if d == dim:
            axes.append(np.concatenate(column))
            continue
        ids = column[0]
        for other in column[1:]:
            ids = run.tie(ids, other)
        axes.append(ids)
    return Value(tuple(axes), _common_origin(run, parts))


@rule("stack")
def stack(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    parts: list[Value] = args[0]
    axes = list(parts[0].axes)
    for part in parts[1:]:
        axes = [run.tie(a, b) for a, b in zip(axes, part.axes, strict=True)]
    dim = _dim(parts[0], kwargs.get("dim", args[1] if len(args) > 1 else 0), 1)
    axes.insert(dim, uniform(len(parts), FIXED if len(parts) > 1 else FREE))
    return Value(tuple(axes), _common_origin(run, parts))


def _common_origin(run: Propagation, parts: Sequence[Value]) -> Origin:
    if all(p.origin is Origin.WEIGHT and p.offset == 0 for p in parts):
        return Origin.WEIGHT
    return run.origin_of(parts)


@rule("slice")
def slice_(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = args[0]
    dim, start, end, step = (list(args[1:]) + [0, None, None, 1][len(args) - 1 :])[:4]
    axes = list(value.axes)
    d = _dim(value, dim)
    axes[d] = axes[d][slice(start, end, step)]
    return with_axes(value, axes)


@rule("narrow")
def narrow(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value, dim, start, length = args
    axes = list(value.axes)
    d = _dim(value, dim)
    axes[d] = axes[d][start : start + length] if start >= 0 else axes[d][start:][:length]
    return with_axes(value, axes)


@rule("select")
def select(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value, dim = args[0], _dim(args[0], args[1])
    if len(value.axes[dim]) > 1:
        run.ids.block(value.axes[dim], f"one index is picked by its position ({run.where})")
    return with_axes(value, [a for n, a in enumerate(value.axes) if n != dim])


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split")
def split_(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> list[Value]:
    value = args[0]
    dim = _dim(value, kwargs.get("dim", args[2] if len(args) > 2 else 0))
    result, start = [], 0
    for meta in node.meta["val"]:
        size = int(meta.shape[dim])
        axes = list(value.axes)
        axes[dim] = axes[dim][start : start + size]
        result.append(with_axes(value, axes))
        start += size
    return result


@rule("unbind")
def unbind(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> list[Value]:
    value = args[0]
    dim = _dim(value, kwargs.get("dim", args[1] if len(args) > 1 else 0))
    if len(value.axes[dim]) > 1:
        run.ids.block(value.axes[dim], f"one index is picked by its position ({run.where})")
    rest = [a for n, a in enumerate(value.axes) if n != dim]
    return [with_axes(value, rest) for _ in value.axes[dim]]


@rule("getitem")
def getitem(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return args[0][args[1]]


@rule("flip", "roll", "rot90")
def flip(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = args[0]
    dims = args[1] if operator_name(node.target) == "flip" else args[2] if len(args) > 2 else []
    for d in dims if isinstance(dims, list) else [dims]:
        run.ids.block(value.axes[d], f"reordered ({run.where})")
    return with_axes(value, value.axes)


@rule("constant_pad_nd", "pad")
def pad(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value, amounts = args[0], list(args[1])
    axes = list(value.axes)
    for n in range(len(amounts) // 2):
        before, after = amounts[2 * n], amounts[2 * n + 1]
        if before == after == 0:
            continue
        d = value.ndim - 1 - n
        run.ids.block(axes[d], f"padded ({run.where})")
        axes[d] = uniform(len(axes[d]) + before + after, FIXED)
    origin = value.origin if value.origin is Origin.CONSTANT else Origin.ACTIVATION
    return Value(tuple(axes), origin)


@rule("tril", "triu")
def triangle(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = args[0]
    for ids in value.axes[-2:]:
        run.ids.block(ids, f"masked by position ({run.where})")
    axes = [*value.axes[:-2], *(run.plain(len(i), Origin.ACTIVATION) for i in value.axes[-2:])]
    return Value(tuple(axes), value.origin)


@rule("index", "_unsafe_index")
def index(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value: Value = args[0]
    picks: list[Value | None] = [*args[1], *[None] * (value.ndim - len(args[1]))]
    known = [(n, p.numbers) for n, p in enumerate(picks) if p is not None and p.numbers is not None]
    if len(known) == sum(p is not None for p in picks) == 1 and known[0][1].ndim == 1:
        chosen = list(value.axes)
        chosen[known[0][0]] = chosen[known[0][0]][known[0][1]]
        return with_axes(value, chosen)
    for ids, pick in zip(value.axes, picks, strict=True):
        if pick is not None:
            pick_from(run, ids, pick)
    indices = [p for p in picks if p is not None]
    common = run.broadcast(indices)
    positions = [n for n, p in enumerate(picks) if p is not None]
    adjacent = positions == list(range(positions[0], positions[-1] + 1))
    axes = [a for a, p in zip(value.axes, picks, strict=True) if p is None]
    at = positions[0] if adjacent else 0
    axes[at:at] = common
    return replace(with_axes(value, axes), selects=value.selects)


def pick_from(run: Propagation, ids: Ids, pick: Value) -> None:
    """The indices ``pick`` choose from the axis ``ids``: tied where they number the same units, blocked otherwise."""
    if pick.selects is not None and len(pick.selects) == len(ids):
        run.tie(ids, pick.selects)
    else:
        run.ids.block(ids, f"indexed by computed positions ({run.where})")


@rule("index_select")
def index_select(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value, dim, pick = args[0], _dim(args[0], args[1]), args[2]
    pick_from(run, value.axes[dim], pick)
    axes = list(value.axes)
    axes[dim] = pick.axes[0] if pick.axes else uniform(1, FREE)
    return with_axes(value, axes)


@rule("gather", "take_along_dim")
def gather(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value, dim, pick = args[0], _dim(args[0], args[1]), args[2]
    pick_from(run, value.axes[dim], pick)
    axes = []
    for d, ids in enumerate(pick.axes):
        if d != dim and len(ids) == len(value.axes[d]):
            ids = run.tie(ids, value.axes[d])  # noqa: PLW2901
        axes.append(ids)
    return Value(tuple(axes), run.origin_of([value, pick]))


@rule("embedding")
def embedding(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    table, pick = args[0], args[1]
    if pick.selects is not None:
        run.tie(table.axes[0], pick.selects)
    else:
        run.ids.block(table.axes[0], "rows are looked up by number")
    return Value((*pick.axes, table.axes[1]), run.origin_of([table, pick]))


@rule("one_hot")
def one_hot(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    size = int(node.meta["val"].shape[-1])
    pick = args[0]
    fits = pick.selects is not None and len(pick.selects) == size
    if pick.selects is not None and not fits:
        run.ids.block(pick.selects, f"numbered otherwise ({run.where})")
    return Value((*pick.axes, pick.selects if fits else uniform(size, FIXED)))


@rule("scatter", "scatter_add", "scatter_reduce", "index_put", "index_add", "index_copy", "masked_scatter")
def scatter(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if "scatter" in str(node.target) and isinstance(args[1], int) and "masked" not in str(node.target):
        value, dim, pick = args[0], _dim(args[0], args[1]), args[2]
        pick_from(run, value.axes[dim], pick)
        return Value(value.axes)
    return run.unknown_operator(node, "index_put", args, kwargs)
