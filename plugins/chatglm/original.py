"""ChatGLM2, ChatGLM3 and GLM-4 in their original format, as GLM and fast tokenizers of transformers."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, GlmConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SpmConverter, TikTokenConverter, import_protobuf
from transformers.modeling_utils import load_state_dict

from llmpruner import CheckpointError, ModelError, UnsupportedModelError, meta_model, read_json

from . import CHAT_FORMAT, ROLES, ROUNDS

VOCABULARY_FILE = "tokenizer.model"
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
# Ids are after the SentencePiece vocabulary, in this order. The released tokenizers name "sop" and "eop" without
# brackets and do not search text for them; a fast tokenizer does, and would find "sop" in "philosophy".
_MARKS = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_GLM4_TOKENS = (
    "<|endoftext|>", *_MARKS, *_ROLES,
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip


def read_config(path: Path) -> PreTrainedConfig:
    """`GlmConfig` of an original ``config.json``. Raises `UnsupportedModelError` for variants that GLM cannot hold."""
    values, style = read_json(path / "config.json"), chat_format(path)
    for name, expected in _GLM_HAS.items():
        if bool(values.get(name, expected)) != bool(expected):
            raise UnsupportedModelError(f"{path} cannot be read as GLM: {name} is {values[name]!r} in its config.json")
    eos = values.get("eos_token_id", 2)
    if style == ROLES:
        # A turn ends where one of another role begins.
        first = _sentencepiece(path).get_piece_size() + len(_MARKS)
        stops = [first + _ROLES.index(role) for role in ("<|user|>", "<|observation|>")]
        eos = [*(eos if isinstance(eos, list) else [eos]), *stops]
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


def read_model(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model with the weights in ``path``; ``dtype`` None keeps what is stored. Raises `CheckpointError` when a
    parameter is missing, unknown or misshapen."""
    config = read_config(path)
    model = meta_model(config)
    keys = config.num_key_value_heads * config.head_dim
    fused = [config.num_attention_heads * config.head_dim, keys, keys]
    state: dict[str, torch.Tensor] = {}
    for file in _weight_files(path):
        for stored, tensor in _tensors(file).items():
            if stored.endswith("rotary_pos_emb.inv_freq"):
                continue
            name = stored
            for old, new in _NAMES:
                name = name.replace(old, new)
            parts = {name: tensor}
            if ".query_key_value." in name:
                three = zip("qkv", torch.split(tensor, fused), strict=True)
                parts = {name.replace("query_key_value", f"{letter}_proj"): part for letter, part in three}
            # Copies, as a part would keep the whole tensor in memory.
            state |= {name: part.to(dtype or part.dtype, copy=True) for name, part in parts.items()}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # several lines, one for each parameter
        raise CheckpointError(f"{path}: {' '.join(str(error).split())[:400]}; download it again") from error
    model.config.dtype = model.dtype
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_dict(read_json(path / "generation_config.json"))
        if isinstance(config.eos_token_id, list):
            model.generation_config.eos_token_id = config.eos_token_id
    return model


def _weight_files(directory: Path) -> list[Path]:
    """safetensors are preferred to ``.bin``."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(directory.glob(pattern)):
            return files
    raise ModelError(f"{directory} holds no weights: no model*.safetensors, no pytorch_model*.bin")


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_state_dict(file))
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{file} is damaged, or holds pickled code, which is never run; download it again, or a safetensors version"
        ) from error


def chat_format(directory: Path) -> str | None:
    """`ROLES` for a tokenizer with role tokens (ChatGLM3), `ROUNDS` without; None for GLM-4 and without a tokenizer."""
    vocabulary = directory / VOCABULARY_FILE
    if not vocabulary.is_file() or _is_tiktoken(vocabulary):
        return None
    for name in ("tokenizer_config.json", "tokenization_chatglm.py"):
        file = directory / name
        if file.is_file() and _ROLES[1] in file.read_text(encoding="utf-8", errors="replace"):
            return ROLES
    return ROUNDS


def read_tokenizer(directory: Path) -> Any | None:
    """A fast tokenizer that pads to the left and starts prompts with ``[gMASK] <sop>``; None without a vocabulary."""
    file = directory / VOCABULARY_FILE
    if not file.is_file():
        return None
    return _from_tiktoken(directory) if _is_tiktoken(file) else _from_sentencepiece(directory)


def _is_tiktoken(file: Path) -> bool:
    """Whether the first line is a token in base64 and its rank."""
    with file.open("rb") as stream:
        return re.fullmatch(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", stream.readline(4096)) is not None


def _sentencepiece(directory: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / VOCABULARY_FILE))


def _from_sentencepiece(directory: Path) -> Any:
    processor = _sentencepiece(directory)
    proto = import_protobuf().ModelProto.FromString(processor.serialized_model_proto())
    pieces = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    unigram = [(piece.piece, piece.score) for piece in proto.pieces]
    is_bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
    tokenizer = SpmConverter.build_tokenizer_from_spm_proto(proto, pieces if is_bpe else unigram)
    controls = [piece.piece for piece in proto.pieces if piece.type in (2, 3)]
    roles = _ROLES if chat_format(directory) == ROLES else ()
    unknown, bos, eos = (processor.id_to_piece(i) for i in (processor.unk_id(), processor.bos_id(), processor.eos_id()))
    # The released tokenizers pad with the unknown token.
    names = {"unk_token": unknown, "pad_token": unknown, "bos_token": bos, "eos_token": eos}
    return _fast(tokenizer, [*controls, *_MARKS, *roles], names)


class _Converter(TikTokenConverter):  # type: ignore[misc]
    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        # tiktoken's own loader caches by path, even when the file has changed.
        lines = Path(tiktoken_url).read_bytes().splitlines()
        return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


def _from_tiktoken(directory: Path) -> Any:
    file = directory / "tokenizer_config.json"
    stored = read_json(file).get("added_tokens_decoder", {}) if file.is_file() else {}
    special = [stored[key]["content"] for key in sorted(stored, key=int)] or list(_GLM4_TOKENS)
    tokenizer = _Converter(str(directory / VOCABULARY_FILE)).converted()
    first = tokenizer.get_vocab_size()
    if stored and sorted(map(int, stored)) != list(range(first, first + len(stored))):
        raise CheckpointError(f"{file}: the added tokens do not follow the {first} tokens of {VOCABULARY_FILE}")
    names = {"pad_token": _GLM4_TOKENS[0], "eos_token": _GLM4_TOKENS[0]}
    return _fast(tokenizer, special, names)


def _fast(tokenizer: Any, special: Sequence[str], names: dict[str, str]) -> Any:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    start, eos = ("[gMASK]", "<sop>"), names["eos_token"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{' '.join(start)} $A",
        pair=f"{' '.join(start)} $A $B:0 {eos}:0",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (*start, eos)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[token for token in special if token not in names.values()],
        **names,
    )
