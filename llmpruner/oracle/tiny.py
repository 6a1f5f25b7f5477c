"""A small model of the same architecture: its configuration with smaller numbers, by what each of them means."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoModelForCausalLM

from ..errors import UnsupportedModelError
from ..models.modeling_llmpruner import per_layer_lists
from ..models.quiet import quiet_transformers
from ..models.remote import register_model_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LAYERS = 3
HEADS = (5, 3), (4, 2)
"""Numbers of heads, and of key/value heads where these are fewer, in the order of trials: odd ones first, because no
other size is a multiple of them; some classes accept even ones only."""
HEAD_DIM = 16
VOCABULARY = 128
POSITIONS = 256

_WIDTH = re.compile(r"intermediate|ffn|n_inner|d_ff|inner_dim|(^|_)mlp_(hidden|dim)|inner_size|mlp_hidden")
_EXPERTS = re.compile(r"(num|n)_.*experts$|^num_experts$|moe_num_experts|num_local_experts|n_routed_experts")
_TOP_K = re.compile(r"top_?k$|experts_per_tok|moe_k$|num_selected|experts_top_k|num_experts_per_token")
_SHARED = re.compile(r"kv_n?_?heads|key_value_heads|query_group|n_head_kv")
_RANK = re.compile(r"rank$|_lora|low_rank")
_TOKEN = re.compile(r"token_id$|_token$|token_index$")
_LENGTH = re.compile(
    r"max_position|n_positions|n_ctx|max_seq|seq_length|max_target|max_source|context_length|max_sequence"
)


def tiny_config(config: PreTrainedConfig, layers: int = LAYERS, heads: tuple[int, int] = (5, 3)) -> PreTrainedConfig:
    """A configuration of the same class with a few narrow layers, every layer type among them.

    ``layers``: how many, unless more are needed to show every type. ``heads``: number of heads, and of
    key/value heads where they are shared; odd, so that other sizes are no multiples of them. What is equal in
    ``config`` stays equal, and flags stay as they are.
    """
    register_model_class(config)  # the small configuration has lost the reference to the code of its class
    if getattr(config, "is_heterogeneous", False):
        # Sizes that differ between layers are replaced by the global ones.
        config = copy.deepcopy(config)
        config.per_layer_config = None
    values = _shrink(config, layers, heads)
    try:
        small = type(config).from_dict(values)
    except Exception as error:  # third-party constructors raise anything
        raise UnsupportedModelError(
            f"a {config.model_type} configuration cannot be shrunk: {type(error).__name__}: {str(error)[:160]}"
        ) from error
    return cast("PreTrainedConfig", small)


def small_config(config: PreTrainedConfig, layers: int = LAYERS) -> PreTrainedConfig:
    """The first `tiny_config`, over `HEADS`, whose model can be built and run.

    Raises `UnsupportedModelError` with the first reason when none can.
    """
    reasons: list[UnsupportedModelError] = []
    for heads in HEADS:
        try:
            small = tiny_config(config, layers, heads)
            _run(random_instance(small))
        except UnsupportedModelError as error:
            reasons.append(error)
        else:
            return small
    raise reasons[0]


def fingerprint(config: PreTrainedConfig) -> tuple[object, ...]:
    """A key that is equal for configurations with equal small models."""
    texts = []
    for heads in HEADS:
        try:
            texts.append(tiny_config(config, heads=heads).to_json_string(use_diff=False))
        except UnsupportedModelError as error:
            texts.append(str(error))
    return type(config), *texts


def _run(model: PreTrainedModel) -> None:
    try:
        with torch.no_grad():
            model(input_ids=torch.arange(7)[None], use_cache=False)
    except Exception as error:
        raise UnsupportedModelError(
            f"a small {model.config.model_type} cannot run: {type(error).__name__}: {str(error)[:160]}"
        ) from error


def random_instance(config: PreTrainedConfig, seed: int = 0, attention: str = "eager") -> PreTrainedModel:
    """A float32 model on the CPU with random weights that make every error visible: no parameter is constant, biases
    and norms included, nor is any saved buffer (the selection bias of experts)."""
    config = copy.deepcopy(config)
    generator = torch.Generator().manual_seed(seed)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=False
            )
        except Exception as error:
            raise UnsupportedModelError(
                f"a small {config.model_type} cannot be built: {type(error).__name__}: {str(error)[:160]}"
            ) from error
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (1.3 / math.sqrt(parameter.shape[-1])))
            else:
                parameter.add_(0.3 * noise)
        saved = model.state_dict(keep_vars=True).keys()
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point() and buffer.numel() > 1 and len(buffer.unique()) == 1:
                # Positive values (variances) stay positive.
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator).abs())
    return cast("PreTrainedModel", model.eval())


def _shrink(config: PreTrainedConfig, layers: int, few: tuple[int, int]) -> dict[str, Any]:
    values: dict[str, Any] = config.to_dict()
    for name, value in list(values.items()):
        part = getattr(config, name, None)
        if isinstance(value, dict) and hasattr(part, "to_dict") and hasattr(part, "model_type"):
            values[name] = _shrink(part, layers, few)
    heads = _heads(config)
    hidden = getattr(config, "hidden_size", None)
    if isinstance(hidden, int) and heads is not None:
        _shrink_attention(config, values, *heads, few)
    _shrink_widths(values)
    _shrink_layers(config, values, layers)
    for name in [n for n in values if _TOKEN.search(n)]:
        values[name] = _small_token(values[name])
    for name in ("_name_or_path", "transformers_version", "architectures", "auto_map"):
        values.pop(name, None)
    return values


def _heads(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Numbers of query and of key/value heads, which are equal where the configuration has no field for the latter
    (also under other names than in transformers); None for a model without heads."""
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, list):
        heads = heads[0] if heads else None
    if not isinstance(heads, int) or heads < 1:
        return None
    own = {name: value for name, value in vars(config).items() if _SHARED.search(name) and _is_size(value)}
    shared = getattr(config, "num_key_value_heads", None) or next(iter(own.values()), None)
    if not isinstance(shared, int) or shared < 1 or heads % shared:
        shared = heads
    return heads, shared


def _shrink_attention(
    config: PreTrainedConfig, values: dict[str, Any], heads: int, shared: int, target: tuple[int, int]
) -> None:
    few_shared = 1 if shared == 1 else target[0] if shared == heads else target[1]
    few = target[0] if shared in (1, heads) else few_shared * 2
    own = getattr(config, "head_dim", None)
    hidden = config.hidden_size
    head_dim = own if isinstance(own, int) and own > 0 else max(hidden // heads, 1)
    scale = HEAD_DIM / head_dim
    names = {v: k for k, v in getattr(config, "attribute_map", {}).items()}

    def put(name: str, value: int) -> None:
        key = config.attribute_map.get(name, name)
        if key in values and isinstance(values[key], int) and not isinstance(values[key], bool):
            values[key] = value

    for name, value in list(values.items()):
        meaning = names.get(name, name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            continue
        if _SHARED.search(meaning):
            values[name] = few_shared if value == shared else few if value == heads else min(value, few_shared)
        elif re.search(r"heads$|n_head$", meaning) and not re.search("mamba|mixer|ssm", meaning):
            values[name] = few if value == heads else min(value, 4)
        elif re.search(r"head_dim|head_size|key_length|d_kv$|kv_channels", meaning) and "mamba" not in meaning:
            values[name] = max(8, int(value * scale) // 8 * 8)
        elif re.search(r"rotary_dim|rotary_ndims|rope_dim", meaning):
            values[name] = max(4, int(value * scale) // 4 * 4)
        elif value == hidden or re.search(
            r"hidden_size|d_model|n_embd|embed_dim|embedding_size|word_embed_proj", meaning
        ):
            values[name] = few * HEAD_DIM if value == hidden else few * HEAD_DIM // 2
    _keep_ratios(config, values)
    put("hidden_size", few * HEAD_DIM)
    if values.get("head_dim", HEAD_DIM) is None:
        values["head_dim"] = HEAD_DIM
    _shrink_state_space(values, few * HEAD_DIM)


def _keep_ratios(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    """Numbers of heads of one further kind of layer (``linear_num_key_heads``, ``linear_num_value_heads``) stay
    multiples of each other as in ``config``."""
    kinds: dict[str, dict[str, int]] = {}
    for name in values:
        kind, found, _ = name.partition("num_")
        before = getattr(config, name, None)
        if kind and found and name.endswith("heads") and _is_size(before):
            kinds.setdefault(kind, {})[name] = cast("int", before)
    for counts in kinds.values():
        fewest = min(counts, key=lambda name: counts[name])
        for name, count in counts.items():
            if count > counts[fewest] and count % counts[fewest] == 0:
                values[name] = min(values[fewest], 4) * (count // counts[fewest])


def _shrink_state_space(values: dict[str, Any], hidden: int) -> None:
    """In state space models, number and size of heads must multiply to the expanded hidden size."""
    names = [n for n in ("mamba_n_heads", "mamba_num_heads") if _is_size(values.get(n))]
    expand = values.get("mamba_expand", values.get("expand"))
    for name in names:
        size = next((n for n in ("mamba_d_head", "mamba_head_dim") if n in values), None)
        if size is not None and isinstance(expand, int | float):
            values[size] = HEAD_DIM
            values[name] = int(expand * hidden) // HEAD_DIM
    for name in [n for n in ("mamba_n_groups", "n_groups") if _is_size(values.get(n))]:
        values[name] = 1


def _shrink_widths(values: dict[str, Any]) -> None:
    rules: list[tuple[Callable[[str], Any], Callable[[list[int]], Mapping[int, int]]]] = [
        (_WIDTH.search, lambda found: {v: 40 + 16 * n for n, v in enumerate(found)}),
        (_EXPERTS.search, lambda found: {v: 8 if v > 4 else v for v in found}),
        (_TOP_K.search, lambda found: {v: min(v, 2) for v in found}),
        (_RANK.search, lambda found: {v: min(v, 24 + 8 * n) for n, v in enumerate(found)}),
        (_LENGTH.search, lambda found: {v: min(v, POSITIONS) for v in found}),
        (re.compile("vocab_size").search, lambda found: {v: min(v, VOCABULARY) for v in found}),
        (
            re.compile("sliding_window|window_size|chunk_size|block_size|attention_window").search,
            lambda found: {v: min(v, 8) for v in found},
        ),
        (re.compile("n_group$|expert_group$").search, lambda found: {v: min(v, 2) for v in found}),
        (re.compile("topk_group").search, lambda found: dict.fromkeys(found, 1)),
        (re.compile("num_hash_buckets|hash_vocab|num_buckets").search, lambda found: {v: min(v, 64) for v in found}),
    ]
    for matches, new_of in rules:
        names = [n for n in values if matches(n) and _is_size(values[n])]
        new = new_of(sorted({v for n in names for v in _sizes(values[n])}))
        for name in names:
            old = values[name]
            values[name] = [new[v] for v in old] if isinstance(old, list) else new[old]


def _shrink_layers(config: PreTrainedConfig, values: dict[str, Any], layers: int) -> None:
    key = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    count = values.get(key)
    if not isinstance(count, int) or count <= layers:
        return
    lists = {n: v for n, v in values.items() if isinstance(v, list) and len(v) == count and not n.startswith("_")}
    chosen = _show_all([tuple(map(str, column)) for column in zip(*lists.values(), strict=True)], count, layers)
    # Lists that are derived from a period cannot be selected from: as many first layers as include every value.
    derived = {n: v for n, v in per_layer_lists(config, count).items() if n not in vars(config)}
    shown = 1 + max((column.index(kind) for column in derived.values() for kind in column), default=-1)
    chosen = sorted({*chosen, *range(shown)})
    for name, value in lists.items():
        values[name] = [value[n] for n in chosen]
    values[key] = len(chosen)
    for name, value in values.items():
        is_layer_number = re.search("first_k_dense|first_dense|dense_replace|num_dense_layers", name)
        if is_layer_number and isinstance(value, int) and value > 1:
            values[name] = 1
        elif re.search(r"(en|de)coder_layers$|num_.*_layers$|n_layers?$", name) and _is_size(value) and name != key:
            values[name] = min(value, len(chosen)) if isinstance(value, int) else value


def _show_all(kinds: Iterable[tuple[str, ...]], count: int, layers: int) -> list[int]:
    """Numbers of the first layers of every kind, in order, with further first layers up to ``layers`` in all."""
    first = {kind: n for n, kind in reversed(list(enumerate(kinds)))}
    chosen = set(first.values())
    chosen.update(n for n in range(count) if n < layers and len(chosen | {n}) <= max(layers, len(first)))
    return sorted(chosen)


def _is_size(value: Any) -> bool:
    return bool(_sizes(value))


def _sizes(value: Any) -> list[int]:
    items = value if isinstance(value, list) else [value]
    return items if items and all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in items) else []


def _small_token(value: Any) -> Any:
    if isinstance(value, list):
        return [_small_token(v) for v in value]
    return value % 32 if isinstance(value, int) and not isinstance(value, bool) and value >= VOCABULARY else value
