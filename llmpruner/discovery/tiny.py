"""A small model of the same architecture: its configuration with smaller numbers, by what each of them means."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError, first_line
from ..models.messages import quiet_transformers, where
from ..models.meta import register_model_class
from ..models.modeling_llmpruner import PER_LAYER, layer_overrides, per_layer_lists
from ..models.stock import for_all_layers

LAYERS = 3  # more where they are needed to show every kind of layer
HEAD_DIM = 16
LARGEST_VOCABULARY = 128

_SHARED = re.compile(r"kv_n?_?heads|key_value_heads|query_group|n_head_kv")
_HEADS = re.compile(r"heads$|n_head$")
_LAYERS = re.compile(r"(en|de)coder_layers$|(^n|num)_.*_layers$|n_layers?$|^num_blocks$")
_NUMBERED = re.compile(r"only_layers$|layer_indices$|layer_ids$|^moe_layers$|cross_attention_layers$")


@dataclass(frozen=True)
class Small:
    """How small. ``heads``: numbers of heads, and of key/value heads where these are fewer. ``complete``: also fill in
    numbers of heads that are open, and keep products (`_keep_products`). ``each``: how many layers of every kind."""

    heads: tuple[int, int]
    complete: bool = False
    each: int = 1


HEADS = (5, 3), (4, 2)
"""Odd numbers first, because no other size is a multiple of them; some classes accept even ones only."""
ATTEMPTS = tuple(Small(heads, complete, each) for each in (1, 2) for complete in (False, True) for heads in HEADS)
"""What is tried until a small model runs; two layers of every kind where layers share weights."""
_FINGERPRINTS: dict[tuple[type, str], tuple[object, ...]] = {}
"""Of this process: every trial cut asks for the one of its model."""


@dataclass(frozen=True)
class Around:
    """Sizes → small ones that a part of a configuration takes from the whole, and from the text model beside it."""

    hidden: Mapping[int, int] = field(default_factory=dict)
    kv_heads: Mapping[int, int] = field(default_factory=dict)
    text: Mapping[int, int] = field(default_factory=dict)


def tiny_config(config: PreTrainedConfig, small: Small = ATTEMPTS[0]) -> PreTrainedConfig:
    """A configuration of the same class with few narrow layers. Raises `UnsupportedModelError` if the class refuses."""
    register_model_class(config)  # the small configuration has no reference to the code of its class
    try:
        return cast("PreTrainedConfig", type(config).from_dict(_shrink(config, small, Around())))
    except Exception as error:  # third-party constructors raise anything
        reason = " ".join(str(error).split())[:240]
        raise UnsupportedModelError(f"a {config.model_type} configuration refuses small numbers: {reason}") from error


def small_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The first of `small_configs`. Raises `UnsupportedModelError` as they do."""
    return next(small_configs(config))


def small_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Every `tiny_config` of `ATTEMPTS` whose model runs. Raises the first `UnsupportedModelError` if none does."""
    reasons: list[UnsupportedModelError] = []
    for attempt in ATTEMPTS:
        try:
            small = tiny_config(config, attempt)
            _run(random_instance(small))
            yield small
        except UnsupportedModelError as error:
            reasons.append(error)
    if len(reasons) == len(ATTEMPTS):
        raise reasons[0]


def fingerprint(config: PreTrainedConfig) -> tuple[object, ...]:
    """A key that is equal for configurations with equal small models."""
    key = type(config), config.to_json_string(use_diff=False)
    if key not in _FINGERPRINTS:
        texts = []
        for attempt in ATTEMPTS:
            with suppress(UnsupportedModelError):
                texts.append(tiny_config(config, attempt).to_json_string(use_diff=False))
        _FINGERPRINTS[key] = (type(config), *texts)
    return _FINGERPRINTS[key]


def _run(model: PreTrainedModel) -> None:
    try:
        with torch.no_grad():
            model(input_ids=torch.arange(7)[None], use_cache=False)
    except Exception as error:
        statement, inside = where(error)
        at = f", as `{statement}` in {inside} stops" if inside else ""
        reason = f"a small {model.config.model_type} cannot run{at}: {first_line(error)[:160]}"
        raise UnsupportedModelError(reason) from error


def random_instance(config: PreTrainedConfig, seed: int = 0, attention: str = "eager") -> PreTrainedModel:
    """A random float32 model on the CPU, in which errors show: no parameter is constant, nor is any saved buffer."""
    config = copy.deepcopy(config)
    generator = torch.Generator().manual_seed(seed)
    options = {"attn_implementation": attention, "dtype": torch.float32, "trust_remote_code": False}
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(config, **options)
        except Exception as error:
            reason = f"a small {config.model_type} cannot be built: {first_line(error)[:160]}"
            raise UnsupportedModelError(reason) from error
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            wide = noise * (1.3 / math.sqrt(parameter.shape[-1])) if parameter.ndim > 1 else parameter + 0.3 * noise
            parameter.copy_(wide)
        saved = model.state_dict(keep_vars=True).keys()
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point() and buffer.numel() > 1 and len(buffer.unique()) == 1:
                # Positive values (variances) stay positive.
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator).abs())
    return cast("PreTrainedModel", model.eval())


def _shrink(config: PreTrainedConfig, small: Small, around: Around) -> dict[str, Any]:
    """The values of ``config`` and of its parts, made ``small``; what is equal stays equal."""
    overrides = layer_overrides(config) or {}
    plain = for_all_layers(config)
    values: dict[str, Any] = plain.to_dict()
    # Some classes write other numbers than their attributes, and accept both.
    values |= {n: v for n, v in vars(plain).items() if n in values and isinstance(v, int | list)}
    # Sizes of single layers become values with the number of the layer in front of their name, to be made small alike.
    values |= {f"{n}.{name}": value for n, stated in overrides.items() for name, value in stated.items()}
    before = dict(values)
    inner = _shrink_hidden(plain, values, small.heads, around)
    text = _shrink_parts(plain, values, small, inner)
    _shrink_widths(values)
    chosen = _shrink_layers(plain, values, small.each, overrides)
    values |= {n: _small_token(v) for n, v in values.items() if re.search("token_id$|_token$|token_index$", n)}
    if small.complete:
        heads = values.get(plain.attribute_map.get("num_attention_heads", "num_attention_heads"))
        values |= {n: heads for n, v in values.items() if v is None and _SHARED.search(n)}
        _keep_products(before, values)
    values |= {n: text[v] for n, v in before.items() if type(v) is int and values[n] == v and v in text}
    of_layers = {n: {name: values.pop(f"{n}.{name}") for name in stated} for n, stated in overrides.items()}
    if layer_overrides(config) is not None:
        values[PER_LAYER] = {new: of_layers[old] for new, old in enumerate(chosen) if old in of_layers}
    of_the_dense = ("_name_or_path", "transformers_version", "architectures", "auto_map")
    return {name: value for name, value in values.items() if name not in of_the_dense}


def _shrink_hidden(config: PreTrainedConfig, values: dict[str, Any], target: tuple[int, int], around: Around) -> Around:
    """Make the hidden size and heads small (``target``: `Small.heads`); returns ``around`` for parts of ``config``."""
    if not isinstance(hidden := getattr(config, "hidden_size", None), int):
        values |= {n: around.kv_heads.get(v, v) for n, v in values.items() if _SHARED.search(n)}
        return around
    before = dict(values)
    queries, shared = _heads(config)
    # A single key/value head stays single, and equal numbers stay equal.
    few_shared = 1 if shared == 1 else target[0] if shared == queries else target[1]
    few = target[0] if shared in (1, queries) else few_shared * 2
    head_dim = getattr(config, "head_dim", None)
    scale = HEAD_DIM / (head_dim if isinstance(head_dim, int) else max(hidden // max(queries, 1), 1))
    small_hidden = around.hidden.get(hidden, few * HEAD_DIM)

    def small(meaning: str, value: int) -> int:
        if _SHARED.search(meaning):
            return few_shared if value == shared else few if value == queries else min(value, few_shared)
        if _HEADS.search(meaning):
            return few if value == queries else min(value, 4)
        if re.search(r"head_dim|head_size|key_length|d_kv$|^d_head$|kv_channels", meaning):
            return max(8, int(value * scale) // 8 * 8)
        if re.search("rotary_dim|rotary_ndims|rope_dim", meaning):
            return max(4, int(value * scale) // 4 * 4)
        if value == hidden or re.search("hidden_size|d_model|n_embd|embed_dim|embedding_size|word_embed_proj", meaning):
            return small_hidden * (value // hidden) if value % hidden == 0 else small_hidden // 2
        return value

    meanings = {v: k for k, v in config.attribute_map.items()}
    values |= {n: small(meanings.get(n, n), v) for n, v in before.items() if type(v) is int and v > 0}
    for name in [n for n in before if _SHARED.search(n) and "." in n]:
        of_queries = f"{name.partition('.')[0]}.num_attention_heads"
        if before[name] == before.get(of_queries):
            values[name] = values[of_queries]
    _keep_ratios(config, values, target[1])
    if values.get("head_dim", HEAD_DIM) is None:
        values["head_dim"] = HEAD_DIM
    _shrink_state_space(values, small_hidden)
    stated = values.get(config.attribute_map.get("hidden_size", "hidden_size"))
    kv_heads = {shared: few_shared} if queries else {}
    return replace(around, hidden={} if stated is None else {hidden: stated}, kv_heads=kv_heads)


def _shrink_parts(config: PreTrainedConfig, values: dict[str, Any], small: Small, around: Around) -> Mapping[int, int]:
    """Make the configurations inside ``config`` small, that of its text model first; returns `Around.text`."""
    text, sizes = config.get_text_config(), around.text
    parts = {n: part for n in values if isinstance(part := getattr(config, n, None), PreTrainedConfig)}
    for name, part in sorted(parts.items(), key=lambda item: item[1] is not text):
        values[name] = _shrink(part, small, replace(around, text={} if part is text else sizes))
        if part is text:
            sizes = {part.hidden_size: values[name][part.attribute_map.get("hidden_size", "hidden_size")]}
    return sizes


def _heads(config: PreTrainedConfig) -> tuple[int, int]:
    """Numbers of query and of key/value heads, whatever they are called; zeros without heads."""
    if not isinstance(heads := getattr(config, "num_attention_heads", None), int) or heads < 1:
        return 0, 0
    shared = next((v for name, v in vars(config).items() if _SHARED.search(name) and _sizes(v)), None)
    return heads, shared if isinstance(shared, int) and heads % shared == 0 else heads


def _keep_ratios(config: PreTrainedConfig, values: dict[str, Any], few: int) -> None:
    """Numbers of heads of further kinds of layer (``linear_num_…_heads``) stay multiples; the least becomes ``few``."""
    kinds: dict[str, dict[str, int]] = {}
    for name, kind in ((name, re.match("(.+)num_.*heads$", name)) for name in values):
        if kind and _sizes(before := getattr(config, name, None)):
            kinds.setdefault(kind[1], {})[name] = cast("int", before)
    for counts in kinds.values():
        fewest = min(counts.values())
        if max(counts.values()) > fewest:
            multiples = {name: count // fewest for name, count in counts.items() if count % fewest == 0}
            values |= {name: min(fewest, few) * times for name, times in multiples.items()}


def _shrink_state_space(values: dict[str, Any], hidden: int) -> None:
    """In state space models, number times size of heads must be the expanded hidden size."""
    expand = values.get("mamba_expand", values.get("expand"))
    size = next((n for n in ("mamba_d_head", "mamba_head_dim", "mamba_headdim", "head_dim") if n in values), None)
    for name in ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads"):
        if _sizes(values.get(name)) and size is not None and expand is not None:
            values[size] = HEAD_DIM
            values[name] = int(expand * hidden) // HEAD_DIM
            if _sizes(values.get("mamba_d_ssm")):
                values["mamba_d_ssm"] = values[name] * HEAD_DIM
    values |= {n: 1 for n in ("mamba_n_groups", "mamba_ngroups", "n_groups") if _sizes(values.get(n))}


def _shrink_widths(values: dict[str, Any]) -> None:
    # A value, and its number among the different values of such fields → the small value.
    width = r"intermediate|ffn|n_inner|^d_inner$|d_ff|dim_ff|inner_dim|(^|_)mlp_(hidden|dim)|inner_size"
    length = "max_position|n_positions|n_ctx|max_seq|seq_length|max_target|max_source|context_length"
    rules: dict[str, Callable[[int, int], int]] = {
        width: lambda _, number: 40 + 16 * number,
        "(num|n)_.*experts$": lambda value, _: 8 if value > 4 else value,
        "top_?k$|experts_per_tok|moe_k$|num_selected": lambda value, _: min(value, 2),
        "rank$|_lora|low_rank": lambda value, number: min(value, 24 + 8 * number),
        length: lambda value, _: min(value, 256),
        "vocab_size": lambda value, _: min(value, LARGEST_VOCABULARY),
        "sliding_window|window_size|chunk_size|block_size|attention_window": lambda value, _: min(value, 8),
        "n_group$|expert_group$": lambda value, _: min(value, 2),
        "topk_group": lambda _, __: 1,
        "buckets|hash_vocab": lambda value, _: min(value, 64),
    }
    for pattern, new_of in rules.items():
        old = {n: v for n, v in values.items() if re.search(pattern, n) and _sizes(v)}
        distinct = sorted({size for v in old.values() for size in _sizes(v)})
        new = {size: new_of(size, number) for number, size in enumerate(distinct)}
        values |= {n: [new[size] for size in v] if isinstance(v, list) else new[v] for n, v in old.items()}


def _shrink_layers(
    config: PreTrainedConfig, values: dict[str, Any], of_each: int, overrides: Mapping[int, Mapping[str, Any]]
) -> list[int]:
    """Choose layers so that ``of_each`` of every kind are among them; returns their numbers."""
    key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if key not in values:  # it is derived from another number
        key = next((n for n in ("num_layers", "num_decoder_layers") if n in values), key)
    if not isinstance(count := values.get(key), int):
        return []
    period = next((n for n, v in values.items() if "layers_per" in n and _sizes(v) and count % v == 0), None)
    if period is not None:
        # Layers that run several times are counted as often.
        times = count // values[period]
        values[period] = min(values[period], LAYERS)
        values[key] = values[period] * times
        return list(range(values[key]))
    if count <= LAYERS:
        return list(range(count))
    lists = {n: v for n, v in values.items() if isinstance(v, list) and len(v) == count and not n.startswith("_")}
    parts = _parts(values, count)
    numbered = {n: v for n, v in values.items() if _NUMBERED.search(n) and isinstance(v, list) and len(v) < count}
    numbered = {n: v for n, v in numbered.items() if set(v) <= set(range(count))}
    among = [[n in value for n in range(count)] for value in numbered.values()]
    columns = [*lists.values(), *parts.values(), *among, [overrides.get(n) for n in range(count)]]
    kinds = list(zip(*(map(str, column) for column in columns), strict=True))
    chosen = [n for n, kind in enumerate(kinds) if kinds[:n].count(kind) < of_each]
    chosen += [n for n in range(LAYERS) if n not in chosen][: max(LAYERS - len(chosen), 0)]
    # Derived lists (from a period) cannot be selected from: take as many first layers as include every value.
    derived = {n: v for n, v in per_layer_lists(config, count).items() if n not in vars(config)}
    shown = 1 + max((column.index(kind) for column in derived.values() for kind in column), default=-1)
    chosen = sorted({*chosen, *range(shown)})
    values |= {name: [value[n] for n in chosen] for name, value in lists.items()}
    values |= {name: [new for new, old in enumerate(chosen) if old in value] for name, value in numbered.items()}
    values[key] = len(chosen)
    for name, value in values.items():
        if name in parts:
            values[name] = sum(parts[name][n] for n in chosen)
        elif type(value) is int and value > 1 and re.search("first_.*dense|num_dense_layers", name):
            values[name] = 1
        elif type(value) is int and _LAYERS.search(name):
            values[name] = min(value, len(chosen))
    return chosen


def _parts(values: Mapping[str, Any], count: int) -> dict[str, list[bool]]:
    """Fields that count consecutive layers → whether each layer is among them: shared last ones, and sections."""
    counts = {n: v for n, v in values.items() if _LAYERS.search(n) and type(v) is int and v < count}
    parts = {name: [n >= count - v for n in range(count)] for name, v in counts.items() if "shared_layers" in name}
    sections = {n: v for n, v in counts.items() if n not in parts}
    if sum(sections.values()) == count:
        owners = [name for name, value in sections.items() for _ in range(value)]
        parts |= {name: [owner == name for owner in owners] for name in sections}
    return parts


def _keep_products(before: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Update numbers that are the product or the quotient of two numbers that were made smaller."""
    sizes = {n: v for n, v in before.items() if type(v) is int and v > 1}
    smaller = [n for n in sizes if values[n] < sizes[n]]
    for name in [n for n in sizes if n not in smaller]:
        for pair in combinations(smaller, 2):
            low, high = sorted(pair, key=sizes.__getitem__)
            if sizes[name] == sizes[low] * sizes[high]:
                values[name] = values[low] * values[high]
                break
            if sizes[name] * sizes[low] == sizes[high] and values[high] % values[low] == 0:
                values[name] = values[high] // values[low]
                break


def _sizes(value: Any) -> list[int]:
    """The sizes in a value that is a size or a list of sizes; none in another value."""
    items = value if isinstance(value, list) else [value]
    return items if all(type(v) is int and v > 0 for v in items) else []


def _small_token(value: Any) -> Any:
    if isinstance(value, list):
        return [_small_token(v) for v in value]
    return value % 32 if type(value) is int and value >= LARGEST_VOCABULARY else value
