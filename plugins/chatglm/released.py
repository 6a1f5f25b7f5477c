"""ChatGLM2, ChatGLM3 and GLM-4 in their original format, as GLM of transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, GlmConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict

from llmpruner import CheckpointError, ModelError, UnsupportedModelError, meta_model, read_json

from .family import CHAT_FORMAT, ROLES, ROUNDS
from .tokenizers import chat_format, role_stops

_GLM_HAS = {
    "quantization_bit": 0, "pre_seq_len": None, "add_bias_linear": False, "rmsnorm": True, "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False, "original_rope": True, "tie_word_embeddings": False,
}  # fmt: skip
"""Options of the original code, with the only values that GLM of transformers can state and released models have."""
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


def read_config(path: Path) -> PreTrainedConfig:
    """`GlmConfig` for an original ``config.json``. Raises `UnsupportedModelError` for variants that GLM cannot
    represent, `ModelError` when a field is missing or invalid."""
    values, style = read_json(path / "config.json"), chat_format(path)
    for name, expected in _GLM_HAS.items():
        if bool(values.get(name, expected)) != bool(expected):
            raise UnsupportedModelError(f"{path} cannot be read as GLM: {name} is {values[name]!r} in its config.json")
    eos = values.get("eos_token_id", 2)
    if style == ROLES:
        # A turn ends where the next role begins.
        eos = [*(eos if isinstance(eos, list) else [eos]), *role_stops(path)]
    try:
        heads = values["num_attention_heads"]
        grouped = values.get("multi_query_attention", True)
        ratio = values.get("rope_ratio", 1)
        rope = {"rope_type": "default", "rope_theta": 10000.0 * ratio, "partial_rotary_factor": 0.5}
        if style == ROUNDS and ratio != 1:
            # ChatGLM2-6B-32K divides positions; later models multiply the base of the rotary embedding.
            rope |= {"rope_type": "linear", "rope_theta": 10000.0, "factor": float(ratio)}
        return GlmConfig(
            vocab_size=values["padded_vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["ffn_hidden_size"],
            num_hidden_layers=values["num_layers"],
            num_attention_heads=heads,
            num_key_value_heads=values["multi_query_group_num"] if grouped else heads,
            head_dim=values.get("kv_channels") or values["hidden_size"] // heads,
            hidden_act="silu",
            attention_bias=values.get("add_qkv_bias", False),
            attention_dropout=values.get("attention_dropout", 0.0),
            max_position_embeddings=values["seq_length"],
            rms_norm_eps=values.get("layernorm_epsilon", 1e-5),
            rope_parameters=rope,
            tie_word_embeddings=False,
            pad_token_id=values.get("pad_token_id", 0),
            eos_token_id=eos,
            bos_token_id=values.get("bos_token_id"),
            use_cache=values.get("use_cache", True),
            dtype=values.get("torch_dtype") or values.get("dtype"),
            architectures=["GlmForCausalLM"],
            name_or_path=str(path),
            **({CHAT_FORMAT: style} if style else {}),
        )
    except KeyError as error:
        raise ModelError(f"{path}/config.json lacks {error}, which every ChatGLM2, ChatGLM3 and GLM-4 has") from None
    except Exception as error:  # its checks of values raise what they like
        raise ModelError(f"{path}/config.json: {' '.join(str(error).split())}") from error


def read_model(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model with the weights in ``path``; ``dtype`` None keeps what is stored. Raises `CheckpointError` when a
    parameter is missing, unknown or misshapen."""
    config = read_config(path)
    model = meta_model(config)
    keys = config.num_key_value_heads * config.head_dim
    fused = [config.num_attention_heads * config.head_dim, keys, keys]
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(path):
        for stored, tensor in _tensors(file).items():
            if stored.endswith("rotary_pos_emb.inv_freq"):
                continue
            name = stored
            for old, new in _NAMES:
                name = name.replace(old, new)
            parts = {name: tensor}
            if ".query_key_value." in name and len(tensor) == sum(fused):
                three = zip("qkv", tensor.split(fused), strict=True)
                parts = {name.replace("query_key_value", f"{letter}_proj"): part for letter, part in three}
            # Copies, as a part would keep the whole tensor in memory.
            state |= {name: part.to(dtype or part.dtype, copy=True) for name, part in parts.items()}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # several lines, one for each parameter
        raise CheckpointError(f"{path}: {' '.join(str(error).split())[:400]}; download it again") from error
    kinds = {parameter.dtype for parameter in model.parameters()}
    if len(kinds) == 1:
        model.config.dtype = kinds.pop()
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_dict(read_json(path / "generation_config.json"))
        if isinstance(config.eos_token_id, list):
            model.generation_config.eos_token_id = config.eos_token_id
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
