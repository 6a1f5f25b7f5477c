"""Tiny ChatGLM instances and vocabularies for the tests of the plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece
import torch
from llmpruner_chatglm import ChatGLMFamily
from llmpruner_chatglm.configuration_chatglm import ChatGLMConfig
from transformers import AutoModelForCausalLM, Glm4Config, GlmConfig

DATA = Path(__file__).parents[2] / "data"
MASK, GMASK, SOP, EOP, PAD = 50, 51, 54, 55, 3

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs.",
    "philosophy begins in wonder, and wonder never stops",
    "你好，世界。我是一个语言模型，很高兴认识你。",
    "def f(x):<n>    return x + 1",
]


def tiny_config(kind: str, **changes: Any) -> Any:
    ChatGLMFamily().register_models()
    if kind == "chatglm":
        values: dict[str, Any] = {
            "vocab_size": 64, "hidden_size": 32, "num_layers": 3, "num_attention_heads": 4, "inner_hidden_size": 48,
            "max_sequence_length": 64, "bos_token_id": SOP, "eos_token_id": EOP, "pad_token_id": PAD,
        }  # fmt: skip
        return ChatGLMConfig(**values | changes)
    values = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 8, "head_dim": 8,
        "num_key_value_heads": 4, "intermediate_size": 40, "max_position_embeddings": 64, "pad_token_id": 0,
        "eos_token_id": 2,
    }  # fmt: skip
    return (Glm4Config if kind == "glm4" else GlmConfig)(**values | changes)


def tiny_model(kind: str, attention: str = "eager", seed: int = 0, **changes: Any) -> Any:
    """Random weights large enough that attention, biases and norms all matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """A left-padded batch of two for ChatGLM-6B, of which one row marks ``[MASK]`` in the middle, and its mask."""
    ids = torch.tensor([[7, 9, 11, MASK, 13, 15, SOP, 20], [PAD, PAD, 21, 22, 23, GMASK, SOP, 24]])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return ids, mask


def train_sentencepiece(prefix: Path, kind: str, symbols: list[str], size: int = 400) -> Path:
    """A small SentencePiece model with byte fallback, at ``prefix`` + ``.model``."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20), model_prefix=str(prefix), model_type=kind, vocab_size=size,
        byte_fallback=True, hard_vocab_limit=False, user_defined_symbols=symbols, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return prefix.with_suffix(".model")
