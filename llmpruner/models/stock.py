"""Finding a stock configuration that represents a cut model exactly.

Candidates are derived from the sizes that changed. One is accepted when the model built from it has the same tensors
and attributes; the caller also compares outputs.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice, product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .messages import quiet_transformers
from .meta import base_of, decoder_layers, empty_model, meta_model
from .modeling_llmpruner import LAYERS, drop_layers, layer_overrides, set_values

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .family import ModelFamily

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Change = tuple[int, int]  # a size before and after the cut
LayerSizes = dict[int, dict[str, int]]
"""Number of a layer → sizes that differ from the configuration."""

WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
HEADS = ("num_attention_heads", "num_key_value_heads")
"""Common names of sizes in transformers; configurations with other names map them (``attribute_map``)."""

MAX_CANDIDATES = 24


def stock_model(
    model: PreTrainedModel, config: PreTrainedConfig, family: ModelFamily | None, of_layers: Callable[[], LayerSizes]
) -> PreTrainedModel | None:
    """An instance, without weights, of a class of transformers with the tensors and attributes of ``model``; or None.
    ``config``: the stock configuration that ``model`` was cut from. ``of_layers``: computes its `per_layer_sizes`."""
    try:
        reference = empty_model(base_of(model), config)
    except Exception:  # no configuration has the remaining layers
        return None
    for candidate, moved in _candidates(model, reference, config, of_layers):
        # Families read sizes of all layers, which transformers refuses where layers differ.
        others = family.stock_configs(candidate) if family and not candidate.is_heterogeneous else ()
        for other in (candidate, *others):
            try:
                with quiet_transformers():
                    built = type(other).from_dict(other.to_dict())  # as it would be read from its file
                    if built.is_heterogeneous:
                        # Saving does it too, and may read a size of all layers where the class itself does not.
                        built.validate()
                built._attn_implementation = other._attn_implementation
                stock = meta_model(built)
            except Exception:  # configurations and constructors refuse sizes by any of them
                continue
            if type(stock).__module__.startswith("transformers.") and is_same(model, stock, moved):
                return stock
    return None


def uncut_model(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """An instance of ``config``, without weights, with the layers that ``model`` has, at their full size."""
    if not (layers := vars(model).get(LAYERS)):
        return empty_model(base_of(model), config)
    config = copy.deepcopy(config)
    set_values(config.get_text_config(), layers["config"])
    built = empty_model(base_of(model), config)
    drop_layers(built, layers["path"], layers["kept"])
    return built


def tensor_shapes(model: nn.Module) -> Shapes:
    """Name → shape of all tensors in the state dict; tied parameters are there under each of their names."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}


def plain_attributes(module: nn.Module, kinds: tuple[type, ...]) -> dict[str, Any]:
    """Public attributes of ``module`` whose values are of ``kinds``, or tuples or lists of them."""
    run_state = ("training", "gradient_checkpointing", "name_or_path", "max_seq_len_cached")
    plain = {n: v for n, v in vars(module).items() if not n.startswith("_") and n not in run_state}
    several = {n: v if isinstance(v, (tuple, list)) and v else (v,) for n, v in plain.items()}
    return {n: v for n, v in plain.items() if all(isinstance(each, kinds) for each in several[n])}


def is_same(model: nn.Module, other: nn.Module, moved: Collection[Change]) -> bool:
    """Whether shapes, numbers in attributes, and buffers are equal. ``moved``: an old and a new size may differ too, as
    of attributes that nothing reads."""
    if tensor_shapes(model) != tensor_shapes(other):
        return False
    modules, others = dict(model.named_modules()), dict(other.named_modules())
    if modules.keys() != others.keys():
        return False
    for path, module in modules.items():
        ours, theirs = (plain_attributes(each, (int, float, bool)) for each in (module, others[path]))
        if ours.keys() != theirs.keys() or not all(
            value == theirs[name] or (type(value) is int and (value, theirs[name]) in moved)
            for name, value in ours.items()
        ):
            return False
    return same_buffers(model, other)


def same_buffers(model: nn.Module, other: nn.Module) -> bool:
    """Whether the buffers that are not saved are equal, up to the rounding of a cast to 16 bits."""
    saved, others = tensor_shapes(model).keys(), dict(other.named_buffers())
    for name, buffer in ((n, b) for n, b in model.named_buffers() if n not in saved):
        twin = others.get(name)
        if twin is None or twin.shape != buffer.shape:
            return False
        on_meta = buffer.is_meta or twin.is_meta
        if not on_meta and not torch.allclose(buffer.float().cpu(), twin.float().cpu(), rtol=2**-7, atol=1e-6):
            return False
    return True


def changed_axes(before: Shapes, after: Shapes) -> Counter[Change]:
    """How many axes of tensors changed from each size to each other size."""
    pairs = ((before.get(name, shape), shape) for name, shape in after.items())
    sizes = (zip(old, new, strict=True) for old, new in pairs if len(old) == len(new))
    return Counter((a, b) for axes in sizes for a, b in axes if a != b)


def size_options(config: PreTrainedConfig, axes: Mapping[Change, int]) -> dict[str, list[int]]:
    """Attribute of a text configuration → values that explain some of the changed axes, most frequent first."""
    head_dim = head_size(config)
    options: dict[str, Counter[int]] = {}
    for name in (*WIDTHS, *EXPERTS, *HEADS):
        value = getattr(config, name, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            continue
        votes: Counter[int] = Counter()
        for (old, new), count in axes.items():
            if old % value:
                continue
            unit = old // value
            possible = unit in (1, 2) if name in WIDTHS else unit == 1 if name in EXPERTS else unit % head_dim == 0
            if possible and new % unit == 0 and new:
                votes[new // unit] += count
        options[name] = votes
    query, key = (options.get(name, Counter[int]()) for name in HEADS)
    if isinstance(getattr(config, HEADS[1], None), int):
        # Fused projections have no axis of key/value heads alone. Query heads go with theirs, in the same share.
        for heads in query:
            shared, rest = divmod(heads * config.num_key_value_heads, config.num_attention_heads)
            if not rest:
                key[shared] += 0
    return {name: [v for v, _ in votes.most_common()] for name, votes in options.items() if votes}


def other_widths(config: PreTrainedConfig, axes: Mapping[Change, int]) -> dict[str, list[int]]:
    """`size_options` for widths of other names (OPT's ``ffn_dim``), and those left open (GPT-2's ``n_inner``)."""
    options: dict[str, list[int]] = {}
    for name, value in vars(config).items():
        known = name in (*WIDTHS, *EXPERTS, *HEADS, "hidden_size", "vocab_size", "num_hidden_layers")
        if known or name.endswith("_id") or name.startswith("_"):
            continue
        is_open = value is None and re.search("inner|ffn|intermediate", name)
        if sizes := [new for old, new in axes if new and (is_open or (type(value) is int and old == value))]:
            options[name] = list(dict.fromkeys(sizes))
    return options


def head_size(config: PreTrainedConfig) -> int:
    """``head_dim``, else the hidden size divided by the number of heads (1 for state space models)."""
    heads = getattr(config, "num_attention_heads", None) or 1
    return int(getattr(config, "head_dim", None) or max(1, config.hidden_size // heads))


def choices(config: PreTrainedConfig, options: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """Combinations of ``options``, the likeliest first; each attribute may also keep its value."""
    ranked = [[*values, *({getattr(config, name)} - set(values))] for name, values in options.items()]
    for values in islice(product(*ranked), MAX_CANDIDATES):
        yield {n: v for n, v in zip(options, values, strict=True) if v != getattr(config, n)}


def with_sizes(config: PreTrainedConfig, sizes: Mapping[str, float]) -> PreTrainedConfig:
    """A copy with new values, not validated: stock classes refuse some sizes that they compute correctly."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    for name, value in sizes.items():
        setattr(text, name, value)
    differs = "head_dim" in (text.per_layer_attributes or ())
    if not differs and hasattr(text, "head_dim") and not isinstance(getattr(type(text), "head_dim", None), property):
        text.head_dim = head_size(for_all_layers(config.get_text_config()))
    return changed


def _candidates(
    model: PreTrainedModel, reference: PreTrainedModel, config: PreTrainedConfig, of_layers: Callable[[], LayerSizes]
) -> Iterator[tuple[PreTrainedConfig, list[Change]]]:
    """Configurations that may describe ``model``, each with the sizes that it changes in ``config``."""
    before, after = tensor_shapes(reference), tensor_shapes(model)
    if before.keys() != after.keys():
        return
    if not _is_uniform(before, after):
        yield from _per_layer_candidates(config, of_layers())
        return
    # One number for all layers cannot state what differs by layer already.
    differs = config.get_text_config().per_layer_attributes or set()
    text = for_all_layers(config.get_text_config())
    axes = changed_axes(before, after)
    options = {n: v for n, v in size_options(text, axes).items() if n not in differs}
    rows, hidden = model.get_input_embeddings().weight.shape
    old_rows, old_hidden = reference.get_input_embeddings().weight.shape
    always = (("hidden_size", old_hidden, hidden), ("vocab_size", old_rows, rows))
    floats = _moved_floats(model, reference, text)
    others = {n: v for n, v in other_widths(text, axes).items() if n not in differs}
    for named in [options, options | others] if others else [options]:
        for chosen in choices(text, named):
            sizes = {**chosen, **{name: new for name, old, new in always if getattr(text, name) == old != new}}
            candidate = with_sizes(config, {**sizes, **floats})
            moved: list[Change] = []
            for name, new in sizes.items():
                value = getattr(text, name)
                before_cut = [a for a, b in axes if b == new] if value is None else [value]
                moved += [(old, new) for old in before_cut]
            yield candidate, moved
    if differs:
        yield from _per_layer_candidates(config, of_layers())


def _per_layer_candidates(
    config: PreTrainedConfig, sizes: LayerSizes
) -> Iterator[tuple[PreTrainedConfig, list[Change]]]:
    """Configurations with ``per_layer_config``, for the classes that obey it. ``sizes``: `per_layer_sizes`."""
    if not sizes:
        return
    layers = ((config.per_layer_config[number], changed) for number, changed in sizes.items())
    moved = [(getattr(layer, name), new) for layer, changed in layers for name, new in changed.items()]
    overrides = layer_overrides(config) or {}
    per_layer = {n: {**overrides.get(n, {}), **sizes.get(n, {})} for n in sorted(overrides.keys() | sizes.keys())}
    # A class may read a size of all layers where it means a default; transformers refuses that unless it is allowed.
    for allowed in (False, True):
        candidate = copy.deepcopy(config)
        candidate.per_layer_config = copy.deepcopy(per_layer)
        candidate.allow_global_per_layer_attribute_access = allowed
        yield candidate, moved


def _is_uniform(before: Shapes, after: Shapes) -> bool:
    """Whether parameters of one name, apart from numbers, and one old shape have one new shape."""
    seen: dict[tuple[str, Shape], Shape] = {}
    changes = ((re.sub(r"\d+", "*", name), before[name], shape) for name, shape in after.items())
    return all(seen.setdefault((name, old), new) == new for name, old, new in changes)


def _moved_floats(model: nn.Module, reference: nn.Module, config: PreTrainedConfig) -> dict[str, float]:
    """Floats of ``config`` (norm epsilons) → their new value, where all modules with another one agree on it."""
    values: dict[float, set[float]] = {}
    modules = dict(model.named_modules())
    for path, module in reference.named_modules():
        for name, old in plain_attributes(module, (float,)).items():
            new = getattr(modules.get(path), name, None)
            if isinstance(old, float) and isinstance(new, float) and new != old:
                values.setdefault(old, set()).add(new)
    floats = {n: v for n, v in config.to_dict().items() if isinstance(v, float)}
    return {n: next(iter(values[v])) for n, v in floats.items() if len(values.get(v, ())) == 1}


def per_layer_sizes(model: PreTrainedModel, config: PreTrainedConfig) -> LayerSizes:
    """Layer number → sizes that differ from ``config``, verified by building such layers; empty if one has none."""
    layers, before, after = decoder_layers(model), tensor_shapes(uncut_model(model, config)), tensor_shapes(model)
    count = len(model.get_submodule(layers))
    outside = any(before.get(name) != shape for name, shape in after.items() if not name.startswith(f"{layers}."))
    # ``per_layer_config`` numbers the layers of the configuration that contains it.
    if outside or config.get_text_config() is not config or getattr(config, "num_hidden_layers", None) != count:
        return {}
    sizes: LayerSizes = {}
    types = vars(config).get(getattr(config, "attribute_map", {}).get("layer_types", "layer_types"))
    for n in range(count):
        prefix = f"{layers}.{n}."
        old, new = _shapes_in(prefix, before), _shapes_in(prefix, after)
        if old == new:
            continue
        single = copy.deepcopy(config.per_layer_config[n])
        try:
            single.num_hidden_layers = 1
        except NotImplementedError:  # encoder and decoder layers are counted apart
            return {}
        if types:
            single.layer_types = [types[n]]
        for chosen in choices(single, size_options(single, changed_axes(old, new))):
            with suppress(Exception):  # constructors refuse sizes by any of them
                shapes = tensor_shapes(empty_model(base_of(model), with_sizes(single, chosen)))
                if _shapes_in(f"{layers}.0.", shapes) == new:
                    sizes[n] = chosen
                    break
        else:
            return {}
    return sizes


def _shapes_in(prefix: str, shapes: Shapes) -> Shapes:
    """The shapes of the tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def for_all_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """``config`` without ``per_layer_config``: with it, transformers refuses to read the values for all layers."""
    if not config.is_heterogeneous:
        return config
    plain = copy.deepcopy(config)
    plain.per_layer_config = None
    return plain
