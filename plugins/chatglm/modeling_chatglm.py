"""ChatGLM-6B for current transformers. Imports torch and transformers alone: it is copied into checkpoints.

Du et al., "GLM: General Language Model Pretraining with Autoregressive Blank Infilling" (ACL 2022); parameter names and
arithmetic are those of the released checkpoints. Shapes: B batch, T new tokens, S keys, N heads, D head size.

A sequence is ``context… <sop> answer…``. Attention is bidirectional in the context and causal in the answer. Every
token has two positions: that in the context, which is that of ``[gMASK]`` (else ``[MASK]``) from ``<sop>`` on, and that
in the answer, which is 0 in the context and counts from 1 at ``<sop>``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_chatglm import ChatGLMConfig

# The residual scale α = √(2·28), constant in the released code, so that it does not change when layers are removed.
_ALPHA = (2 * 28) ** 0.5


@dataclass(frozen=True)
class Layout:
    """The columns of the parts of every row; each tensor is ``[B]``.

    ``start``: first token that is not padding. ``sop``: the ``<sop>`` token. ``mask``: the position of ``[gMASK]``,
    counted from ``start``. A row without ``<sop>`` is the continuation of an empty context, with causal attention, so
    that the likelihood of plain text is valid.
    """

    start: torch.Tensor
    sop: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: ChatGLMConfig) -> Layout:
        """``input_ids`` ``[B, T]`` of whole sequences; ``attention_mask`` ``[B, T]``, 0 on padding, or None."""
        start = torch.zeros_like(input_ids[:, 0])
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, -1)
            start = _first(attention_mask != 0, otherwise=start)
        sop = _first(input_ids == config.bos_token_id, otherwise=start)
        mask = _first(input_ids == config.mask_token_id, otherwise=start)
        mask = _first(input_ids == config.gmask_token_id, otherwise=mask)
        return cls(start, sop, mask - start)

    def position_ids(self, columns: torch.Tensor) -> torch.Tensor:
        """``columns`` ``[T]`` → ``[B, 2, T]``: position in the context, position in the answer."""
        sop = self.sop[:, None]
        in_context = columns < sop
        position = torch.where(in_context, columns - self.start[:, None], self.mask[:, None])
        block = torch.where(in_context, 0, columns - sop + 1)
        return torch.stack((position, block), dim=1).clamp_min(0)

    def visible(
        self, queries: torch.Tensor, keys: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Columns ``[T]`` of queries and ``[S]`` of keys → bool ``[B, 1, T, S]``, True where a query may attend.

        Queries of padding attend to all keys, so that no attention function divides by zero; no other attends to them.
        """
        causal = keys[None, None, None, :] <= queries[None, None, :, None]
        visible = causal | (keys < self.sop[:, None])[:, None, None, :]
        if attention_mask is not None:
            visible = visible & (attention_mask != 0)[:, None, None, :]
        return visible | ~visible.any(-1, keepdim=True)


def _first(matches: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Column of the first True of every row, ``otherwise`` where there is none."""
    return torch.where(matches.any(-1), matches.int().argmax(-1), otherwise)


def rotary_embedding(
    position_ids: torch.Tensor, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine ``[B, 1, 2, T, D/2]`` of both positions; each position rotates one half of the head.

    The inverse frequencies are rounded to fp16, as in training. They are recomputed instead of stored, as a buffer
    would be changed by meta devices and dtype casts.
    """
    dim = head_dim // 2
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=position_ids.device) / dim
    inverse_frequency = (1.0 / 10000.0**exponent).half().float()
    angle = position_ids[..., None].float() * inverse_frequency
    angle = torch.cat((angle, angle), dim=-1)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x`` ``[B, N, T, D]``: its first half by the first position, its second half by the second."""
    parts = torch.stack(x.chunk(2, dim=-1), dim=2)
    left, right = parts.chunk(2, dim=-1)
    rotated = parts * cos + torch.cat((-right, left), dim=-1) * sin
    return torch.cat(rotated.unbind(2), dim=-1)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over ``[B, N, T, D]``; ``attention_mask``: bool, True where a query may attend."""
    scores = (query * scaling) @ key.transpose(-1, -2)
    scores = scores.masked_fill(~attention_mask, -10000.0)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class ChatGLMAttention(nn.Module):
    """Self-attention. Rows of ``query_key_value`` are query, key, value of head 0, then of head 1, …; the number of
    heads is computed from its shape, so that layers may differ."""

    is_causal = False

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        inner = config.num_attention_heads * config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * inner)
        self.dense = nn.Linear(inner, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        fused = self.query_key_value(hidden_states)
        heads = fused.view(*hidden_states.shape[:2], -1, 3 * self.head_dim).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=-1)
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        # transformers lets the implementation be changed only where it finds this call in the source.
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attention(
            self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, is_causal=False, **kwargs
        )
        return self.dense(output.reshape(*hidden_states.shape[:2], -1)), weights


class ChatGLMMLP(nn.Module):
    """Two layers with biases and the tanh approximation of GELU."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh")
        return self.dense_4h_to_h(inner)


class ChatGLMBlock(GradientCheckpointingLayer):
    """One layer. The output of each sub-layer is added to its own *normalised* input, scaled by α."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.attention(normed, position_embeddings, attention_mask, cache, **kwargs)
        normed = self.post_attention_layernorm(normed * _ALPHA + attended)
        return normed * _ALPHA + self.mlp(normed)


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    config: ChatGLMConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "word_embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embeddings, layers and final norm."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ChatGLMBlock(config, n) for n in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """``input_ids`` ``[B, T]``. Positions and visibility follow from them; with a cache, from the first call.
        ``attention_mask``: ``[B, S]`` with 0 on padding. ``position_ids``: ignored; generic callers count from 0."""
        hidden = self.word_embeddings(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None and not (self.gradient_checkpointing and self.training):
            cache = DynamicCache(config=self.config)
        past = int(cache.get_seq_length()) if cache is not None else 0
        # The end of the context is not in later tokens, so the first call stores it in the cache.
        layout = cache.chatglm_layout if past else Layout.of(input_ids, attention_mask, self.config)
        if cache is not None:
            cache.chatglm_layout = layout
        length = past + input_ids.shape[1]
        columns = torch.arange(past, length, device=hidden.device)
        visible = layout.visible(columns, torch.arange(length, device=hidden.device), attention_mask)
        position_embeddings = rotary_embedding(layout.position_ids(columns), self.config.head_dim, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings, visible, cache=cache, **kwargs)
        hidden = self.final_layernorm(hidden)
        return BaseModelOutputWithPast(last_hidden_state=hidden, cache=cache if use_cache else None)


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM-6B with its language-model head, under the name that the released checkpoints use."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `ChatGLMModel.forward`. ``labels`` ``[B, T]`` are shifted here; tokens with −100 are not trained on, nor
        are those before ``<sop>``, as attention to them is bidirectional."""
        output = self.transformer(input_ids, attention_mask, cache, use_cache, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            sop = Layout.of(input_ids, attention_mask, self.config).sop
            columns = torch.arange(labels.shape[1], device=labels.device)
            labels = labels.masked_fill(columns < sop[:, None], -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=output.cache)


ChatGLMForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")
ChatGLMModel.register_for_auto_class("AutoModel")
