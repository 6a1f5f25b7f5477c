"""Heron, a decoder that exists only here: interleaved fused QKV, ALiBi, RMS norms, tied embeddings.

This file stands for the model code that an odd model brings along. It imports only torch and transformers, so that
pruned checkpoints can carry it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers renamed `past_key_values` to `cache`; this file works under either name.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class HeronConfig(PreTrainedConfig):
    model_type = "heron"

    def __init__(
        self,
        vocab_size: int = 258,
        hidden_size: int = 64,
        inner_size: int = 176,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 8,
        tie_word_embeddings: bool = True,
        **options: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.inner_size = vocab_size, hidden_size, inner_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        super().__init__(tie_word_embeddings=tie_word_embeddings, **options)


class HeronAttention(nn.Module):
    """Rows of ``qkv`` lie head by head: the query of head 0, its key, its value, the query of head 1, and so on."""

    def __init__(self, config: HeronConfig, layer: int) -> None:
        super().__init__()
        self.layer_idx = layer
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        steps = torch.arange(1, self.num_heads + 1)
        self.register_buffer("slopes", 2.0 ** (-8.0 * steps / self.num_heads))

    def forward(self, x: torch.Tensor, visible: torch.Tensor, cache: DynamicCache | None) -> torch.Tensor:
        """``x``: (batch, time, hidden). ``visible``: bool, (batch, 1, time, keys)."""
        batch, time, _ = x.shape
        heads = self.qkv(x).view(batch, time, self.num_heads, 3, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in heads.unbind(3))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        keys = torch.arange(k.shape[2], device=x.device)
        distance = keys[-time:, None] - keys
        bias = (-self.slopes.view(-1, 1, 1) * distance).masked_fill(~visible, float("-inf"))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.out(mixed.transpose(1, 2).reshape(batch, time, -1))


class HeronNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class HeronBlock(nn.Module):
    def __init__(self, config: HeronConfig, layer: int) -> None:
        super().__init__()
        self.norm_1 = HeronNorm(config.hidden_size)
        self.attention = HeronAttention(config, layer)
        self.norm_2 = HeronNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.inner_size)
        self.down = nn.Linear(config.inner_size, config.hidden_size)

    def forward(self, x: torch.Tensor, visible: torch.Tensor, cache: DynamicCache | None) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x), visible, cache)
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class HeronForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = HeronConfig
    _tied_weights_keys = {"head.weight": "embed.weight"}  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: HeronConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(HeronBlock(config, n) for n in range(config.num_hidden_layers))
        self.norm = HeronNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
        past_key_values: DynamicCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0
        keys = torch.arange(past + input_ids.shape[1], device=input_ids.device)
        visible = (keys <= keys[past:, None])[None, None]
        if attention_mask is not None:
            # A padded position sees itself, or the softmax over nothing would give NaN.
            own = keys == keys[past:, None]
            visible = visible & (attention_mask[:, None, None, :].bool() | own)
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, visible, cache)
        if not bool(torch.isfinite(x).all()):
            raise ValueError("the activations are not finite; use bfloat16 or float32 instead of float16")
        logits = self.head(self.norm(x))
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
