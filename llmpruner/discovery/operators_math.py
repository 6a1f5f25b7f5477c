"""Rules for operators that compute: element-wise operators, contractions, reductions, norms, attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.fx import Node

from .operators_shape import VIEWS, argument, merge
from .propagate import FIXED, FREE, KEEPS_TAG, Ids, Mark, Origin, Propagation, Tag, Value, operator_name, rule, uniform

IDENTITY = (
    "to", "_to_copy", "alias", "contiguous", "clone", "detach", "detach_", "dropout", "type_as", "lift_fresh_copy",
)  # fmt: skip
UNARY = (
    "silu", "gelu", "relu", "relu6", "leaky_relu", "elu", "mish", "hardswish", "tanh", "sigmoid", "log_sigmoid",
    "softplus", "exp", "exp2", "expm1", "log", "log1p", "erf", "neg", "abs", "sign", "cos", "sin", "sqrt", "rsqrt",
    "reciprocal", "square", "floor", "round", "isinf", "isnan", "clamp", "clamp_min", "clamp_max", "nan_to_num",
    "bitwise_not", "logical_not",
)  # fmt: skip
BINARY = (
    "add", "add_", "sub", "rsub", "mul", "mul_", "div", "div_", "floor_divide", "remainder", "pow", "maximum",
    "minimum", "eq", "ne", "lt", "le", "gt", "ge", "where", "masked_fill", "masked_fill_", "__and__", "__or__",
    "bitwise_and", "bitwise_or", "logical_and", "logical_or", "copy_", "polar",
)  # fmt: skip
KEEPS_TAG.update(IDENTITY, UNARY, BINARY, ("mean", "_assert_tensor_metadata"))
STEPS = {
    ("mean_square", "add"): "mean_square", ("mean_square", "maximum"): "mean_square",
    ("mean_square", "clamp"): "mean_square", ("mean_square", "clamp_min"): "mean_square",
    ("mean_square", "sqrt"): "root", ("mean_square", "pow 0.5"): "root",
    ("root", "add"): "root", ("root", "maximum"): "root",
    ("mean_square", "rsqrt"): "inverse", ("mean_square", "pow -0.5"): "inverse",
    ("root", "reciprocal"): "inverse", ("root", "pow -1.0"): "inverse",
}  # fmt: skip
"""Stage of an RMS norm, and an operator on it alone or with a number → the next stage."""


def _short(node: Node) -> str:
    """The name of the operator, without the ``_`` of one in place."""
    name = operator_name(node.target)
    return name if name.startswith("__") else name.rstrip("_")


def _after(run: Propagation, tag: Tag | None, step: str = "") -> Tag | None:
    """The tag after a ``step`` of `STEPS`; after any other, what is normalised is blocked."""
    if tag is None or tag.stage == "square":
        return None
    if stage := STEPS.get((tag.stage, step)):
        return Tag(stage, tag.ids)
    run.block(tag.ids, "a norm without a weight of its own")
    return None


@rule(*IDENTITY)
def identity(run: Propagation, node: Node, value: Any, *_: Any, **__: Any) -> Any:
    return value


@rule("_assert_tensor_metadata", "_assert_async", "_assert_scalar")
def nothing(run: Propagation, node: Node, *_: Any, **__: Any) -> Any:
    return None


@rule(*UNARY)
def unary(run: Propagation, node: Node, value: Value, *_: Any, **__: Any) -> Value:
    tag = Tag("square", value.axes[-1]) if _short(node) == "square" else _after(run, value.tag, _short(node))
    return Value(value.axes, tag=tag)


@rule(*BINARY)
def binary(run: Propagation, node: Node, *args: Any, **kwargs: Any) -> Any:
    operands = [a for a in [*args, *kwargs.values()] if isinstance(a, Value)]
    name = _short(node)
    if not operands:
        return node.meta.get("val")  # arithmetic on sizes
    for value in operands if name != "clamp" else ():
        if value.selects is not None:
            run.block(value.selects, "a choice is read as a number")
    if len(operands) == 1 or (len(operands) == 2 and any(v.ndim == 0 for v in operands)):
        return _with_scalar(run, name, args, operands)
    if name != operator_name(node.target):
        # In place: what is written shows in all views of the target, so where that has no identities, nothing may go.
        pairs = [pair for value in operands[1:] for pair in zip(operands[0].axes[::-1], value.axes[::-1], strict=False)]
        for mine, theirs in (pair for pair in pairs if len(pair[0]) == len(pair[1])):
            run.block(theirs[mine < 0], "written into another tensor")
    tag = _norm_step(run, name, operands)
    return Value(run.broadcast(operands), tag=tag)


def _with_scalar(run: Propagation, name: str, args: Sequence[Any], operands: list[Value]) -> Value:
    value = max(operands, key=lambda v: v.ndim)
    number = next((float(a) for a in args if isinstance(a, int | float) and not isinstance(a, bool)), None)
    scaled = name in ("mul", "div") and value.offset == 0 and isinstance(args[0], Value)
    is_weight = value.origin is Origin.WEIGHT and number is not None and (name == "add" or scaled)
    offset = value.offset + (number or 0.0) if is_weight and name == "add" else 0.0
    tag = _after(run, value.tag, f"pow {number}" if name == "pow" else name)
    if name == "pow" and number == 2 and value.axes and isinstance(args[0], Value):
        tag = Tag("square", value.axes[-1])
    selects = value.selects if name == "clamp" else None
    return Value(value.axes, Origin.WEIGHT if is_weight else None, offset, selects, tag)


def _norm_step(run: Propagation, name: str, operands: list[Value]) -> Tag | None:
    """Follow an RMS norm through a product or quotient of two tensors."""
    left, right = operands[0], operands[1]
    if name == "mul" and left is right and left.tag is None:
        return Tag("square", left.axes[-1])
    tags = [v.tag for v in operands if v.tag is not None and v.tag.stage != "square"]
    if not tags:
        return None
    if len(tags) == 1 and len(operands) == 2:
        tagged, other = (left, right) if left.tag is tags[0] else (right, left)
        stage, ids = tags[0].stage, tags[0].ids
        scales = (stage == "inverse" and name == "mul") or (stage == "root" and name == "div" and tagged is right)
        if scales and other.axes and np.array_equal(other.axes[-1], ids):
            return Tag("normed", ids)
        if stage == "normed" and name == "mul" and other.origin is Origin.WEIGHT and other.ndim == 1:
            run.mark(other.axes[-1], Mark.RMS)
            run.offsets.append((other.axes[-1], other.offset))
            return None
    for tag in tags:
        _after(run, tag)
    return None


@rule("softmax", "log_softmax")
def softmax(run: Propagation, node: Node, value: Value, dim: int, *_: Any, **__: Any) -> Value:
    for d, ids in enumerate(value.axes):
        run.mark(ids, Mark.SOFTMAX if d == dim % value.ndim else Mark.ATTENDS)
    return Value(value.axes)


@rule("sum", "amax", "amin", "any", "all", "logsumexp", "prod", "var", "std", "linalg_vector_norm", "mean", "argmax",
      "argmin")  # fmt: skip
def reduction(run: Propagation, node: Node, value: Value, *args: Any, **kwargs: Any) -> Value:
    dim = argument(args, kwargs, 1 if _short(node) == "linalg_vector_norm" else 0, "dim")
    dims = [dim] if isinstance(dim, int) else dim or range(value.ndim)
    keep = node.meta["val"].ndim == value.ndim > 0
    is_mean_square = value.tag is not None and value.tag.stage == "square" and _short(node) == "mean"
    if is_mean_square and [d % value.ndim for d in dims] == [value.ndim - 1] and (value.axes[-1] >= 0).any():
        axes = (*value.axes[:-1], uniform(1, FREE)) if keep else value.axes[:-1]
        return Value(axes, tag=Tag("mean_square", value.axes[-1]))
    _after(run, value.tag)
    return Value(run.reduce(value, dims, keep))


@rule("cumsum", "cumprod", "diff")
def scan(run: Propagation, node: Node, value: Value, *args: Any, **kwargs: Any) -> Value:
    dim = argument(args, kwargs, 1 if _short(node) == "diff" else 0, "dim", -1) % value.ndim
    run.block(value.axes[dim], "accumulated along it")
    return Value((*value.axes[:dim], run.plain(int(node.meta["val"].shape[dim])), *value.axes[dim + 1 :]))


@rule("topk")
def topk(run: Propagation, node: Node, value: Value, count: int, dim: int = -1, *_: Any) -> list[Value]:
    dim %= value.ndim
    ids = value.axes[dim]
    run.mark(ids, Mark.ROUTED)
    run.minimum.append((ids, count))
    axes = (*value.axes[:dim], run.plain(count), *value.axes[dim + 1 :])
    return [Value(axes, selects=value.selects), Value(axes, selects=ids)]


@rule("max", "min")
def extreme(run: Propagation, node: Node, value: Value, other: Any = None, *_: Any) -> Any:
    metas = node.meta["val"]
    if isinstance(other, Value):
        return Value(run.broadcast([value, other]))
    if not isinstance(metas, tuple | list):
        return Value(run.reduce(value, range(value.ndim), False))
    return [Value(run.reduce(value, [other], metas[0].ndim == value.ndim))] * 2


@rule("linear")
def linear(run: Propagation, node: Node, x: Value, weight: Value, bias: Value | None = None) -> Value:
    run.contract(x.axes[-1], weight.axes[-1], x, weight)
    if weight.ndim == 1:
        return Value(x.axes[:-1])
    out = weight.axes[0] if bias is None else run.tie(weight.axes[0], bias.axes[-1])
    return Value((*x.axes[:-1], out))


@rule("matmul", "mm", "bmm")
def matmul(run: Propagation, node: Node, left: Value, right: Value) -> Value:
    summed = right.axes[-2] if right.ndim > 1 else right.axes[0]
    run.contract(left.axes[-1], summed, left, right)
    batch = run.broadcast([replace(left, axes=left.axes[:-2]), replace(right, axes=right.axes[:-2])])
    for ids in batch if left.origin is right.origin is Origin.ACTIVATION else ():
        run.mark(ids, Mark.ATTENDS)
    return Value((*batch, *left.axes[-2:-1], *(right.axes[-1:] if right.ndim > 1 else ())))


@rule("addmm", "baddbmm")
def addmm(run: Propagation, node: Node, bias: Value, left: Value, right: Value, **_: Any) -> Value:
    return Value(run.broadcast([matmul(run, node, left, right), bias]))


@rule("einsum")
def einsum(run: Propagation, node: Node, equation: str, operands: list[Value], **__: Any) -> Any:
    inputs, output = equation.replace(" ", "").split("->")
    letters: dict[str, tuple[Ids, Value]] = {}
    for term, value in zip(inputs.split(","), operands, strict=True):
        if "." in term or len(set(term)) != len(term):
            return NotImplemented
        for letter, ids in zip(term, value.axes, strict=True):
            if letter not in letters:
                letters[letter] = ids, value
            elif letter in output:
                letters[letter] = run.tie(letters[letter][0], ids), value
            else:
                run.contract(letters[letter][0], ids, letters[letter][1], value)
                letters[letter] = uniform(len(ids), FIXED), value
    for letter, (ids, _) in letters.items():
        if letter not in output and inputs.count(letter) != 2:
            run.block(ids, "summed over")
    return Value(tuple(letters[letter][0] for letter in output))


@rule("conv1d")
def conv1d(run: Propagation, node: Node, x: Value, weight: Value, bias: Value | None = None, *args: Any) -> Any:
    groups = args[3] if len(args) == 4 else 1
    if x.ndim != 3 or groups not in (1, len(x.axes[1])) or (groups > 1 and len(weight.axes[0]) != groups):
        return NotImplemented
    if groups == 1:
        run.contract(x.axes[1], weight.axes[1], x, weight)
    out = weight.axes[0] if groups == 1 else run.tie(x.axes[1], weight.axes[0])
    out = out if bias is None else run.tie(out, bias.axes[0])
    run.block(x.axes[2], "convolved")
    return Value((x.axes[0], out, run.plain(int(node.meta["val"].shape[2]))))


@rule("layer_norm")
def layer_norm(run: Propagation, node: Node, x: Value, shape: list[int], *args: Any) -> Value:
    for n in range(1, len(shape) + 1):
        run.block(x.axes[-n], "a LayerNorm runs over it, which no cut can reproduce")
        for weight in [a for a in args if isinstance(a, Value)]:
            run.tie(x.axes[-n], weight.axes[-n])
    return Value(x.axes)


@rule("rms_norm")
def rms_norm(run: Propagation, node: Node, x: Value, shape: list[int], weight: Value | None = None, *_: Any) -> Value:
    if weight is not None and weight.origin is Origin.WEIGHT and len(shape) == 1:
        run.mark(weight.axes[-1], Mark.RMS)
        run.offsets.append((weight.axes[-1], weight.offset))
        return Value((*x.axes[:-1], run.tie(x.axes[-1], weight.axes[-1])))
    for n in range(1, len(shape) + 1):
        run.block(x.axes[-n], "a norm without a weight of its own")
        if weight is not None:
            run.tie(x.axes[-n], weight.axes[-n])
    return Value(x.axes)


@rule("scaled_dot_product_attention")
def attention(
    run: Propagation, node: Node, q: Value, k: Value, v: Value, attn_mask: Value | None = None, *_: Any, **__: Any
) -> Value:
    run.contract(q.axes[-1], k.axes[-1], q, k)
    run.contract(k.axes[-2], v.axes[-2], k, v)
    heads = q.axes[-3]
    for shared in (k.axes[-3], v.axes[-3]):
        heads = run.tie(heads, merge(run, [shared, uniform(len(heads) // len(shared), FREE)]))
    if attn_mask is not None and attn_mask.ndim >= 3 and len(attn_mask.axes[-3]) == len(heads):
        heads = run.tie(heads, attn_mask.axes[-3])
    run.mark(heads, Mark.ATTENDS)
    run.block(q.axes[-2], "a position in a sequence")
    return Value((*q.axes[:-3], heads, q.axes[-2], v.axes[-1]))


@rule("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like",
      "scalar_tensor", "empty", "new_empty", "empty_like")  # fmt: skip
def filled(run: Propagation, node: Node, *_: Any, **__: Any) -> Value:
    """A tensor that is written in parts gets new identities, which each write ties to what is written."""
    shape = [int(n) for n in node.meta["val"].shape]
    if "empty" in operator_name(node.target) or _is_written_to(node):
        return Value(tuple(run.new(n) if n > 1 else uniform(n, FREE) for n in shape), Origin.ACTIVATION)
    return Value(tuple(uniform(n, FREE) for n in shape), Origin.CONSTANT)


def _is_written_to(node: Node) -> bool:
    """Whether an operator in place changes the tensor or a view of it."""
    users = [(user, operator_name(user.target)) for user in node.users if user.args and user.args[0] is node]
    return any(n in BINARY if n.endswith("_") else n in VIEWS and _is_written_to(user) for user, n in users)


@rule("view_as_complex")
def view_as_complex(run: Propagation, node: Node, value: Value) -> Value:
    run.block(value.axes[-1], "one half of a complex number")
    return Value(value.axes[:-1])


@rule("view_as_real")
def view_as_real(run: Propagation, node: Node, value: Value) -> Value:
    return Value((*value.axes, uniform(2, FIXED)))
