"""Rules for operators that compute: element-wise operators, contractions, reductions, norms, attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch.fx import Node

from .ids import FIXED, FREE, Ids, Mark
from .operators_shape import VIEWS, merge
from .propagate import KEEPS_TAG, Origin, Propagation, Tag, Value, operator_name, rule, uniform

IDENTITY = (
    "to", "_to_copy", "alias", "contiguous", "clone", "detach", "dropout", "native_dropout", "type_as",
    "lift_fresh_copy", "detach_", "lift_fresh", "feature_dropout", "dropout_",
)  # fmt: skip
UNARY = (
    "silu", "gelu", "relu", "relu6", "tanh", "sigmoid", "exp", "exp2", "expm1", "log", "log2", "log1p",
    "neg", "abs", "cos", "sin", "sqrt", "rsqrt", "reciprocal", "softplus", "mish", "hardswish",
    "hardsigmoid", "leaky_relu", "elu", "erf", "sign", "square", "floor", "ceil", "round", "trunc",
    "bitwise_not", "logical_not", "isinf", "isnan", "isfinite", "clamp", "clamp_min", "clamp_max", "clip",
    "nan_to_num", "hardtanh", "threshold", "logsigmoid", "log_sigmoid", "selu", "tan", "atan", "fill",
    "zero", "silu_", "relu_", "celu", "softshrink", "positive", "logit", "acos", "asin", "cosh", "sinh",
)  # fmt: skip
BINARY = (
    "add", "sub", "mul", "div", "pow", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "where",
    "masked_fill", "__and__", "__or__", "__xor__", "bitwise_and", "bitwise_or", "logical_and",
    "logical_or", "bitwise_xor", "logical_xor", "rsub", "remainder", "fmod", "floor_divide", "atan2",
    "true_divide", "lerp", "addcmul", "addcdiv", "add_", "mul_", "sub_", "div_", "prelu", "xlogy", "copy",
    "copy_", "masked_fill_", "bitwise_right_shift", "bitwise_left_shift", "__rshift__", "__lshift__",
    "fmax", "fmin", "isin", "polar", "complex", "rms_scale",
)  # fmt: skip
KEEPS_TAG.update(
    IDENTITY,
    (
        "rsqrt", "sqrt", "add", "mul", "div", "pow", "reciprocal", "clamp", "clamp_min", "maximum",
        "mean", "_assert_tensor_metadata",
    ),
)  # fmt: skip


def _short(node: Node) -> str:
    """Name of the operator, in place or not."""
    name = operator_name(node.target)
    return name if name.startswith("__") else name.rstrip("_")


@rule(*IDENTITY)
def identity(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return args[0]


@rule("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range_for_size", "sym_size", "dim")
def nothing(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return None


@rule(*UNARY)
def unary(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = args[0]
    name = _short(node)
    moved = {
        ("mean_square", "rsqrt"): "inverse", ("mean_square", "sqrt"): "root", ("root", "reciprocal"): "inverse",
        ("mean_square", "clamp"): "mean_square", ("mean_square", "clamp_min"): "mean_square",
    }  # fmt: skip
    tag = None
    if value.tag is not None and value.tag.stage != "square":
        stage = moved.get((value.tag.stage, name))
        tag = _advance(run, value.tag, stage)
    if name == "square":
        tag = Tag("square", value.axes[-1])
    return Value(value.axes, run.origin_of([value]), tag=tag)


def _advance(run: Propagation, tag: Tag, stage: str | None) -> Tag | None:
    if stage is None:
        run.ids.block(tag.ids, f"normalised in a way that is not understood ({run.where})")
        return None
    return Tag(stage, tag.ids)


@rule(*BINARY)
def binary(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    operands = [a for a in [*args, *kwargs.values()] if isinstance(a, Value)]
    name = _short(node)
    if not operands:
        return node.meta.get("val")  # arithmetic on sizes
    if len(operands) == 1 or (len(operands) == 2 and any(v.ndim == 0 for v in operands)):
        return _with_scalar(run, name, args, operands)
    raw = operator_name(node.target)
    if raw.endswith("_") and not raw.startswith("__"):
        _written(run, operands)
    if name == "masked_fill" and operands[0].selects is not None:
        run.ids.block(operands[0].selects, f"a choice is replaced by a fixed position ({run.where})")
    tag = _norm_step(run, name, operands)
    return Value(run.broadcast(operands), run.origin_of(operands), tag=tag)


def _written(run: Propagation, operands: list[Value]) -> None:
    """An operator in place also changes other views of its target; what is written there is followed only where the
    target has identities of its own, and blocked elsewhere."""
    target = operands[0]
    for value in operands[1:]:
        for mine, theirs in zip(target.axes[::-1], value.axes[::-1], strict=False):
            if len(mine) == len(theirs):
                run.ids.block(theirs[mine < 0], f"written into another tensor ({run.where})")


def _with_scalar(run: Propagation, name: str, args: list[Any], operands: list[Value]) -> Value:
    value = max(operands, key=lambda v: v.ndim)
    number = next((float(a) for a in args if isinstance(a, int | float) and not isinstance(a, bool)), None)
    origin = run.origin_of(operands)
    offset, tag = 0.0, None
    if value.origin is Origin.WEIGHT and number is not None:
        if name == "add":
            origin, offset = Origin.WEIGHT, value.offset + number
        elif name in ("mul", "div") and value.offset == 0 and isinstance(args[0], Value):
            origin = Origin.WEIGHT
    if value.tag is not None and value.tag.stage != "square":
        stage = value.tag.stage
        power = {("mean_square", -0.5): "inverse", ("mean_square", 0.5): "root", ("root", -1.0): "inverse"}
        if name == "pow" and number is not None:
            tag = _advance(run, value.tag, power.get((stage, number)))
        elif name in ("add", "maximum") and stage in ("mean_square", "root"):
            tag = value.tag
        else:
            tag = _advance(run, value.tag, None)
    if name == "pow" and number == 2 and value.axes and isinstance(args[0], Value):
        tag = Tag("square", value.axes[-1])
    selects = value.selects if name == "clamp" else None
    return Value(value.axes, origin, offset, selects, tag)


def _norm_step(run: Propagation, name: str, operands: list[Value]) -> Tag | None:
    """Follow an RMS norm through a product or quotient of two tensors."""
    left, right = operands[0], operands[1]
    if name == "mul" and left.tag is None and right.tag is None and left is right:
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
            run.ids.mark(other.axes[-1], Mark.RMS)
            run.offsets.append((other.axes[-1], other.offset))
            return None
    for tag in tags:
        _advance(run, tag, None)
    return None


@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def softmax(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = args[0]
    dim = args[1] % value.ndim
    run.ids.mark(value.axes[dim], Mark.SOFTMAX)
    for d, ids in enumerate(value.axes):
        if d != dim:
            run.ids.mark(ids, Mark.ATTENDS)
    return Value(value.axes, run.origin_of([value]))


@rule("sum", "amax", "amin", "any", "all", "logsumexp", "prod", "var", "std", "norm", "linalg_vector_norm", "mean",
      "argmax", "argmin", "nansum")  # fmt: skip
def reduction(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value: Value = args[0]
    name = _short(node)
    rank, old = node.meta["val"].ndim, value.ndim
    dims = kwargs.get(
        "dim", args[2 if name in ("norm", "linalg_vector_norm") and len(args) > 2 else 1] if len(args) > 1 else None
    )
    if dims is not None and not isinstance(dims, list):
        dims = [int(dims)]
    if not dims:
        dims = list(range(old))
    keep = rank == old and old > 0
    square = value.tag is not None and value.tag.stage == "square"
    if name == "mean" and square and [d % old for d in dims] == [old - 1] and (value.axes[-1] >= 0).any():
        last = [uniform(1, FREE)] if keep else []
        return Value((*value.axes[:-1], *last), run.origin_of([value]), tag=Tag("mean_square", value.axes[-1]))
    if value.tag is not None and not square:
        _advance(run, value.tag, None)
    return Value(run.reduce(value, dims, keep), run.origin_of([value]))


@rule("cumsum", "cumprod", "logcumsumexp", "diff")
def scan(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value: Value = args[0]
    name = _short(node)
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", -1)) if name == "diff" else args[1]
    axes = list(value.axes)
    d = dim % value.ndim
    run.ids.block(axes[d], f"accumulated along it ({run.where})")
    axes[d] = run.plain(int(node.meta["val"].shape[d]), Origin.ACTIVATION)
    return Value(tuple(axes), run.origin_of([value]))


@rule("topk", "sort", "argsort", "max", "min", "kthvalue")
def choice(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    value: Value = args[0]
    name = _short(node)
    metas = node.meta["val"]
    if not isinstance(metas, tuple | list) and name in ("max", "min"):
        operands = [a for a in args if isinstance(a, Value)]
        if len(operands) == 2:
            return Value(run.broadcast(operands), run.origin_of(operands))
        return Value(run.reduce(value, None, False), run.origin_of([value]))
    default = args[2] if name == "topk" and len(args) > 2 else args[1] if name != "topk" and len(args) > 1 else -1
    dim = kwargs.get("dim", default if isinstance(default, int) and not isinstance(default, bool) else -1) % value.ndim
    ids = value.axes[dim]
    if name == "topk":
        run.ids.mark(ids, Mark.ROUTED)
        run.ids.need_at_least(ids, int(metas[0].shape[dim]))
    elif name in ("max", "min"):
        run.ids.block(ids, f"reduced ({run.where})")
    elif (ids >= 0).any():
        run.ids.mark(ids, Mark.ROUTED)
    shapes = [tuple(m.shape) for m in (metas if isinstance(metas, tuple | list) else [metas])]
    axes = list(value.axes)
    if len(shapes[0]) < value.ndim:
        del axes[dim]
    else:
        axes[dim] = run.plain(shapes[0][dim], Origin.ACTIVATION)
    values = Value(tuple(axes), run.origin_of([value]), selects=value.selects)
    indices = Value(tuple(axes), run.origin_of([value]), selects=ids)
    return [values, indices] if len(shapes) == 2 else indices


@rule("linear")
def linear(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    x, weight = args[0], args[1]
    run.contract(x.axes[-1], weight.axes[-1], x, weight)
    out = weight.axes[0] if weight.ndim == 2 else None
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if out is None:
        return Value(x.axes[:-1])
    if isinstance(bias, Value):
        out = run.tie(out, bias.axes[-1])
    return Value((*x.axes[:-1], out), run.origin_of([x, weight]))


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    left, right = args[0], args[1]
    first = right.axes[-2] if right.ndim > 1 else right.axes[0]
    run.contract(left.axes[-1], first, left, right)
    batch = run.broadcast([replace(left, axes=left.axes[:-2]), replace(right, axes=right.axes[:-2])])
    if left.origin is right.origin is Origin.ACTIVATION:
        for ids in batch:
            run.ids.mark(ids, Mark.ATTENDS)
    rows = left.axes[-2:-1] if left.ndim > 1 else ()
    columns = right.axes[-1:] if right.ndim > 1 else ()
    return Value((*batch, *rows, *columns), run.origin_of([left, right]))


@rule("addmm", "baddbmm", "addmv")
def addmm(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    product = matmul(run, node, args[1:3], {})
    return Value(run.broadcast([product, args[0]]), product.origin)


@rule("einsum")
def einsum(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    inputs, output = args[0].replace(" ", "").split("->")
    letters: dict[str, tuple[Ids, Value]] = {}
    for term, value in zip(inputs.split(","), args[1], strict=True):
        if "." in term or len(set(term)) != len(term):
            result: Value = run.unknown_operator(node, "einsum", args, kwargs)
            return result
        for letter, ids in zip(term, value.axes, strict=True):
            if letter not in letters:
                letters[letter] = ids, value
            elif letter in output:
                letters[letter] = run.tie(letters[letter][0], ids), value
            else:
                run.contract(letters[letter][0], ids, letters[letter][1], value)
                letters[letter] = uniform(len(ids), FIXED), value
    for letter, (ids, _) in letters.items():
        if letter not in output:
            appearances = sum(letter in term for term in inputs.split(","))
            if appearances != 2:
                run.ids.block(ids, f"summed over ({run.where})")
    return Value(tuple(letters[letter][0] for letter in output), run.origin_of(args[1]))


@rule("conv1d", "convolution")
def conv1d(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    groups = args[-1] if len(args) in (7, 9) else 1
    if x.ndim != 3 or groups not in (1, len(x.axes[1])) or (groups > 1 and len(weight.axes[0]) != groups):
        return run.unknown_operator(node, "conv1d", args, kwargs)
    out = weight.axes[0]
    if groups == 1:
        run.contract(x.axes[1], weight.axes[1], x, weight)
    else:
        out = run.tie(x.axes[1], out)
    if isinstance(bias, Value):
        out = run.tie(out, bias.axes[0])
    run.ids.block(x.axes[2], f"convolved ({run.where})")
    return Value((x.axes[0], out, run.plain(int(node.meta["val"].shape[2]), Origin.ACTIVATION)))


@rule("layer_norm", "native_layer_norm")
def layer_norm(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    x: Value = args[0]
    for n in range(1, len(args[1]) + 1):
        ids = x.axes[-n]
        run.ids.block(ids, f"a LayerNorm runs over it, which no cut can reproduce ({run.where})")
        for weight in [a for a in args[2:4] if isinstance(a, Value)]:
            run.tie(ids, weight.axes[-n])
            run.ids.mark(weight.axes[-n], Mark.LAYER_NORM)
    return Value(x.axes)


@rule("rms_norm", "_fused_rms_norm")
def rms_norm(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    x: Value = args[0]
    weight = args[2] if len(args) > 2 else kwargs.get("weight")
    ids = x.axes[-1]
    if isinstance(weight, Value) and weight.origin is Origin.WEIGHT and len(args[1]) == 1:
        run.ids.mark(weight.axes[-1], Mark.RMS)
        run.offsets.append((weight.axes[-1], weight.offset))
        return Value((*x.axes[:-1], run.tie(ids, weight.axes[-1])))
    for n in range(1, len(args[1]) + 1):
        run.ids.block(x.axes[-n], f"a norm without a weight of its own ({run.where})")
        if isinstance(weight, Value):
            run.tie(x.axes[-n], weight.axes[-n])
    return Value(x.axes)


@rule("scaled_dot_product_attention")
def attention(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    q, k, v = args[0], args[1], args[2]
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    run.contract(q.axes[-1], k.axes[-1], q, k)
    run.contract(k.axes[-2], v.axes[-2], k, v)
    heads = q.axes[-3]
    for shared in (k.axes[-3], v.axes[-3]):
        times = len(heads) // len(shared)
        repeated = merge(run, [shared, uniform(times, FREE)]) if times > 1 else shared
        heads = run.tie(heads, repeated)
    if isinstance(mask, Value) and mask.ndim >= 3 and len(mask.axes[-3]) == len(heads):
        heads = run.tie(heads, mask.axes[-3])
    run.ids.mark(heads, Mark.ATTENDS)
    run.ids.block(q.axes[-2], f"a position in a sequence ({run.where})")
    return Value((*q.axes[:-3], heads, q.axes[-2], v.axes[-1]))


@rule("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like",
      "scalar_tensor")  # fmt: skip
def filled(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    if _is_written_to(node):
        return _fresh(run, node)
    return Value(tuple(uniform(int(n), FREE) for n in node.meta["val"].shape), Origin.CONSTANT)


def _is_written_to(node: Node) -> bool:
    """Whether an operator in place changes the tensor, or a view of it, as in a loop that writes one position of the
    output after the other."""
    for user in node.users:
        name = operator_name(user.target)
        if name in VIEWS and user.args[0] is node and _is_written_to(user):
            return True
        if name.endswith("_") and not name.startswith("_") and name.rstrip("_") in BINARY and user.args[0] is node:
            return True
    return False


@rule("empty", "new_empty", "empty_like")
def empty(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return _fresh(run, node)


def _fresh(run: Propagation, node: Node) -> Value:
    """A tensor that is written in parts later: it gets new identities, which each write ties to what is written."""
    shape = [int(n) for n in node.meta["val"].shape]
    return Value(tuple(run.ids.new(n) if n > 1 else uniform(n, FREE) for n in shape))


@rule("view_as_complex")
def view_as_complex(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value: Value = args[0]
    run.ids.block(value.axes[-1], f"one half of a complex number ({run.where})")
    return Value(value.axes[:-1], run.origin_of([value]))


@rule("view_as_real")
def view_as_real(run: Propagation, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value: Value = args[0]
    return Value((*value.axes, uniform(2, FIXED)), run.origin_of([value]))
