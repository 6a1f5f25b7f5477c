"""Small random models of every architecture that GGUF files are written for."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
BOTH_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
WINDOW = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}

CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}),
    "llama-biases": ("llama", "Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied-wide-heads": ("llama", "Llama", {"head_dim": 16, "tie_word_embeddings": True}),
    "llama-llama3": ("llama", "Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", "Llama", {"rope_parameters": LINEAR}),
    "llama-yarn": ("llama", "Llama", {"rope_parameters": YARN}),
    "llama-yarn-factor": ("llama", "Llama", {"rope_parameters": {**YARN, "attention_factor": 1.5}}),
    "mistral": ("llama", "Mistral", {"sliding_window": None}),
    "mixtral": ("llama", "Mixtral", {"num_local_experts": 4}),
    "qwen2": ("qwen2", "Qwen2", {}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 16}),
    "qwen3-yarn": ("qwen3", "Qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "qwen3-moe": (
        "qwen3moe", "Qwen3Moe", {"head_dim": 8, "moe_intermediate_size": 32, **EXPERTS, "norm_topk_prob": True}
    ),
    "olmoe": ("olmoe", "Olmoe", {"num_key_value_heads": 4, **EXPERTS}),
    "gemma": ("gemma", "Gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", "Gemma2", WINDOW),
    "gemma2-one-layer": (
        "gemma2", "Gemma2", {"num_hidden_layers": 1, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
    ),
    "gemma3": (
        "gemma3", "Gemma3Text",
        {**WINDOW, "num_hidden_layers": 7, "rope_parameters": BOTH_ROPES, "final_logit_softcapping": 20.0},
    ),
}  # fmt: skip
"""Name → architecture in the file, class, and its configuration beside `SIZES`."""


def random_model(name: str) -> Any:
    return model_of(CONFIGS[name][1], **CONFIGS[name][2])


def model_of(name: str, **options: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**SIZES | copy.deepcopy(options))
    return randomised(transformers.AutoModelForCausalLM.from_config(config))


def randomised(model: Any, spread: float = 0.2) -> Any:
    """Weights large enough that a wrong order of channels changes logits as much as other weights would."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, spread)
    model.tie_weights()
    return model.eval()


def prompt(model: Any, length: int = 48) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[None], use_cache=False).logits[0].float()
