"""What must follow a cut, as code: attributes computed again from the shapes that are left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..coupling import LAYER
from .samples import NoRuleError, Sample
from .source import assign, indented

if TYPE_CHECKING:
    from ..discovery.follow import Follow
    from ..discovery.verify import Verdict


@dataclass(frozen=True)
class Axis:
    """An axis of a parameter within a layer. ``cut_by``: the kinds of units that shorten it."""

    parameter: str
    axis: int
    size: int
    cut_by: frozenset[str]


def refresh_method(sample: Sample, verdicts: Iterable[Verdict]) -> list[str]:
    """The method ``refresh`` that does what the oracle found to be needed in ``sample``. Raises `NoRuleError`."""
    from ..discovery.follow import Follow
    from ..meta import meta_model

    rules: dict[tuple[str, str], list[Follow]] = {}
    for verdict in verdicts:
        for rule in verdict.follows:
            if not isinstance(rule, Follow) or "." in rule.attribute:
                raise NoRuleError(f"{rule} must follow a cut, which no attribute of a module says")
            rules.setdefault((rule.path, rule.attribute), []).append(rule)
    model = meta_model(sample.config)
    lines = [
        "def refresh(self, model: PreTrainedModel, counts: Mapping[str, int]) -> None:",
        '    """Numbers that modules keep are computed again from the shapes that are left."""',
        "    del counts",
    ]
    inside = []
    for (path, attribute), found in rules.items():
        kinds = frozenset(rule.kind for rule in found)
        prefix = f"{sample.graph.layers}.*"
        if not path.startswith(prefix):
            raise NoRuleError(f"{path}.{attribute}, outside the layers, must follow a cut")
        relative = path.removeprefix(prefix).lstrip(".")
        value = _value(model, path.replace("*", "0"), attribute)
        target = ".".join(["layer", *filter(None, [relative]), attribute])
        inside.append(assign(target, _source(sample, relative, value, kinds)))
    if inside:
        lines += [f"    for layer in {_access('model', sample.graph.layers)}:", *indented(sorted(inside), 8)]
    else:
        lines[1:] = ['    """Nothing but parameters follows a cut."""', "    del model, counts"]
    return lines


def _value(model: Any, path: str, attribute: str) -> int:
    try:
        value = getattr(model.get_submodule(path), attribute)
    except AttributeError as error:
        raise NoRuleError(f"{path}.{attribute} is not in every layer") from error
    return int(value)


def _source(sample: Sample, module: str, value: int, kinds: frozenset[str]) -> str:
    """Shapes that give ``value`` and change when, and only when, units of ``kinds`` go."""
    axes = sorted(_axes(sample), key=lambda a: (not a.parameter.startswith(module + "."), len(a.parameter), a.axis))
    for exact in (True, False):
        for axis in axes:
            if (axis.cut_by == kinds if exact else axis.cut_by > kinds) and axis.size == value:
                return _shape(axis)
        for over in axes:
            for under in axes:
                change = over.cut_by ^ under.cut_by
                if (change == kinds if exact else change > kinds) and over.size == value * under.size:
                    return f"{_shape(over)} // {_shape(under)}"
        for axis in axes:
            if (axis.cut_by == kinds if exact else axis.cut_by > kinds) and axis.size % value == 0:
                per_unit = _per_unit(sample, axis.size // value)
                if per_unit is not None:
                    return f"{_shape(axis)} // {per_unit}"
    raise NoRuleError(f"no shape says the {value} of {module} that must follow a cut of {', '.join(sorted(kinds))}")


def _per_unit(sample: Sample, number: int) -> str | None:
    """A size that no cut changes."""
    config = sample.config
    if getattr(config, "head_dim", None) == number:
        return "model.config.head_dim"
    heads = getattr(config, "num_attention_heads", None)
    if type(heads) is int and config.hidden_size == number * heads:
        return "(model.config.hidden_size // model.config.num_attention_heads)"
    return None


def _axes(sample: Sample) -> Iterator[Axis]:
    """The axes of the first layer that groups shorten."""
    cut: dict[tuple[str, int], set[str]] = {}
    prefix = f"{sample.graph.layers}.0."
    for group in sample.graph.groups:
        for span in group.spans:
            # Biases are not in every model.
            if span.parameter.startswith(prefix) and group.kind != LAYER and not span.parameter.endswith(".bias"):
                cut.setdefault((span.parameter, span.axis), set()).add(group.kind)
    for (parameter, axis), kinds in cut.items():
        size = sample.graph.shapes[parameter][axis]
        yield Axis(parameter.removeprefix(prefix), axis, size, frozenset(kinds))


def _shape(axis: Axis) -> str:
    return f"{_access('layer', axis.parameter)}.shape[{axis.axis}]"


def _access(owner: str, path: str) -> str:
    """``layers.0.mlp`` as an expression."""
    text = owner
    for part in path.split("."):
        text += f"[{part}]" if part.isdigit() else f".{part}"
    return text
