"""Models in the released formats of ChatGLM: 6B as the plugin's own class, later generations as transformers' GLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, GlmConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict

from llmpruner import CheckpointError, ModelError, UnsupportedModelError, meta_model, read_json

from .configuration_chatglm import ChatGLMConfig
from .family import CHAT_FORMAT, LATER_KEY, ROLES, ROUNDS, register
from .tokenization_chatglm import VOCABULARY_FILE, ChatGLMTokenizer
from .tokenizers import chat_format, one_line, role_stops

Convert = Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]]
"""Stored name and tensor → the model's parameters that it holds; none for what is not needed."""


def read_6b_config(path: Path) -> PreTrainedConfig:
    register()
    values = read_json(path / "config.json")
    try:
        # The released auto_map names files that do not work with current transformers; saving writes a new one.
        config = ChatGLMConfig.from_dict({k: v for k, v in values.items() if k != "auto_map"})
    except Exception as error:  # its checks of values raise what they like
        raise UnsupportedModelError(f"{path}/config.json: {' '.join(str(error).split())}") from error
    config.name_or_path = str(path)
    return config


def read_6b_model(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    return _with_generation_config(read_model(read_6b_config(path), path, _of_6b, dtype), path)


def _of_6b(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if not name.endswith("rotary_emb.inv_freq"):
        yield name, tensor


def read_6b_tokenizer(path: Path) -> Any | None:
    if not (path / VOCABULARY_FILE).is_file():
        return None
    with one_line(path / VOCABULARY_FILE):
        return ChatGLMTokenizer.from_pretrained(path)


def read_later_config(path: Path) -> PreTrainedConfig:
    style = chat_format(path)
    config = glm_config(read_json(path / "config.json"), path, interpolate=style == ROUNDS)
    if style is not None:
        setattr(config, CHAT_FORMAT, style)
    if style == ROLES:
        # A turn ends where the next role begins.
        own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        config.eos_token_id = [*own, *role_stops(path)]
    config.name_or_path = str(path)
    return config


def read_later_model(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    config = read_later_config(path)
    return _with_generation_config(read_model(config, path, _of_later(config), dtype), path)


def _of_later(config: PreTrainedConfig) -> Convert:
    """Queries, keys and values are stored in one projection, one after the other; other parameters are renamed."""
    sizes = [config.num_attention_heads * config.head_dim, *[config.num_key_value_heads * config.head_dim] * 2]

    def convert(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if name.endswith("rotary_pos_emb.inv_freq"):
            return
        if ".query_key_value." in name and tensor.shape[0] == sum(sizes):
            for letter, part in zip("qkv", tensor.split(sizes), strict=True):
                yield glm_name(name).replace("query_key_value", f"{letter}_proj"), part
        else:
            yield glm_name(name), tensor

    return convert


_NAMES = (
    ("transformer.embedding.word_embeddings.", "model.embed_tokens."),
    ("transformer.encoder.final_layernorm.", "model.norm."),
    ("transformer.encoder.layers.", "model.layers."),
    ("transformer.output_layer.", "lm_head."),
    (".self_attention.dense.", ".self_attn.o_proj."),
    (".self_attention.", ".self_attn."),
    (".mlp.dense_h_to_4h.", ".mlp.gate_up_proj."),
    (".mlp.dense_4h_to_h.", ".mlp.down_proj."),
)


def glm_name(original: str) -> str:
    """The name in `GlmForCausalLM` of a parameter of the original format; the caller splits ``query_key_value``."""
    for old, new in _NAMES:
        original = original.replace(old, new)
    return original


def glm_config(values: Mapping[str, Any], path: Path, *, interpolate: bool = False) -> PreTrainedConfig:
    """`GlmConfig` for the original ``config.json`` of ChatGLM2, ChatGLM3 or GLM-4.

    ``interpolate``: ``rope_ratio`` divides positions, as in ChatGLM2-6B-32K; in later models it multiplies the base of
    the rotary embedding. Raises `UnsupportedModelError` for variants that GLM cannot represent, `ModelError` when a
    field is missing.
    """
    _refuse_variants(values, path)
    try:
        heads = values["num_attention_heads"]
        grouped = values.get("multi_query_attention", True)
        return GlmConfig(
            vocab_size=values["padded_vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["ffn_hidden_size"],
            num_hidden_layers=values["num_layers"],
            num_attention_heads=heads,
            num_key_value_heads=values[LATER_KEY] if grouped else heads,
            head_dim=values.get("kv_channels") or values["hidden_size"] // heads,
            hidden_act="silu",
            attention_bias=values.get("add_qkv_bias", False),
            attention_dropout=values.get("attention_dropout", 0.0),
            max_position_embeddings=values["seq_length"],
            rms_norm_eps=values.get("layernorm_epsilon", 1e-5),
            rope_parameters=_rope(values.get("rope_ratio", 1), interpolate),
            tie_word_embeddings=values.get("tie_word_embeddings", False),
            pad_token_id=values.get("pad_token_id", 0),
            eos_token_id=values.get("eos_token_id", 2),
            bos_token_id=values.get("bos_token_id"),
            use_cache=values.get("use_cache", True),
            dtype=values.get("torch_dtype") or values.get("dtype"),
            architectures=["GlmForCausalLM"],
        )
    except KeyError as error:
        raise ModelError(f"{path}/config.json lacks {error}, which every ChatGLM2, ChatGLM3 and GLM-4 has") from None
    except Exception as error:  # its checks of values raise what they like
        raise ModelError(f"{path}/config.json: {' '.join(str(error).split())}") from error


def _rope(ratio: float, interpolate: bool) -> dict[str, Any]:
    if interpolate and ratio != 1:
        return {"rope_type": "linear", "factor": float(ratio), "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return {"rope_type": "default", "rope_theta": 10000.0 * ratio, "partial_rotary_factor": 0.5}


_GLM_HAS = {
    "quantization_bit": 0, "pre_seq_len": None, "add_bias_linear": False, "rmsnorm": True, "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False, "original_rope": True,
}  # fmt: skip
"""Options of the original code, with the only values that GLM of transformers can state and released models have."""


def _refuse_variants(values: Mapping[str, Any], path: Path) -> None:
    for name, expected in _GLM_HAS.items():
        if bool(values.get(name, expected)) != bool(expected):
            raise UnsupportedModelError(f"{path} cannot be read as GLM: {name} is {values[name]!r} in its config.json")


def _with_generation_config(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    if (path / "generation_config.json").is_file():
        own = GenerationConfig.from_dict(read_json(path / "generation_config.json"))
        if isinstance(model.config.eos_token_id, list):
            own.eos_token_id = model.config.eos_token_id
        model.generation_config = own
    return model


def read_model(config: PreTrainedConfig, directory: Path, convert: Convert, dtype: torch.dtype | None) -> Any:
    """A model of ``config`` with the weights in ``directory``. ``dtype``: None keeps what is stored. Raises
    `CheckpointError` when a parameter is missing, unknown or misshapen, and when tied parameters differ."""
    model = meta_model(config)
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(directory):
        for stored, tensor in _tensors(file).items():
            for name, part in convert(stored, tensor):
                # A copy, as a part would keep the whole tensor in memory.
                state[name] = part.to(dtype or part.dtype, copy=True)
    for name, other in model.all_tied_weights_keys.items():
        # Checkpoints of tied models store one of the two, or both.
        for one, two in ((name, other), (other, name)):
            if two in state:
                state.setdefault(one, state[two])
        if name in state and not torch.equal(state[name], state[other]):
            raise CheckpointError(
                f"{directory}: {name} and {other} differ, but the configuration ties them; "
                'set "tie_word_embeddings": false in config.json'
            )
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # several lines, one for each parameter
        raise CheckpointError(f"{directory}: {' '.join(str(error).split())[:400]}; download it again") from error
    model.tie_weights()
    kinds = {parameter.dtype for parameter in model.parameters()}
    if len(kinds) == 1:
        model.config.dtype = kinds.pop()
    return model.eval()


def weight_files(directory: Path) -> list[Path]:
    """The weight files, safetensors preferred to ``.bin``. Raises `ModelError` when there are none, `CheckpointError`
    when a shard is missing."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{single}.index.json"
        if (directory / single).is_file():
            return [directory / single]
        if index.is_file():
            # Without directories, which may be outside the checkpoint.
            files = [directory / Path(name).name for name in sorted({*read_json(index).get("weight_map", {}).values()})]
            for file in files:
                if not file.is_file():
                    raise CheckpointError(f"{directory} lacks {file.name}, one of {len(files)} files; download it")
            return files
    raise ModelError(f"{directory} holds no weights; expected model.safetensors or pytorch_model.bin, or an index")


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """Raises `CheckpointError` when the file is damaged, or contains anything but tensors."""
    try:
        return dict(load_state_dict(file))
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{file} is damaged, or holds pickled code, which is never run; download it again, or a safetensors version"
        ) from error
