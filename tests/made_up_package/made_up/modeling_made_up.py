"""A decoder of unusual layout: per KV head value, key and queries are adjacent; up and gate are packed, up first; its
norms multiply by one plus their weight; attention and MLP read the same input."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_made_up import MadeUpConfig


class MadeUpNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = 1e-5

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class MadeUpAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.queries = config.num_attention_heads // config.num_key_value_heads
        rows = config.num_key_value_heads * (self.queries + 2) * config.head_dim
        self.vkq = nn.Linear(config.hidden_size, rows, bias=config.attention_bias)
        self.out = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x, mask, positions, cache):
        grid = self.vkq(x).unflatten(-1, (-1, self.queries + 2, self.head_dim))
        v, k = grid[..., 0, :].transpose(1, 2), grid[..., 1, :].transpose(1, 2)
        q = grid[..., 2:, :].flatten(2, 3).transpose(1, 2)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        k, v = (t.repeat_interleave(self.queries, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def rotate(self, x, positions):
        half = self.head_dim // 2
        speeds = 1e4 ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
        angles = positions[:, None, :, None].float() * speeds
        a, b = x[..., :half], x[..., half:]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class MadeUpMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up_gate = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        up, gate = self.up_gate(x).chunk(2, -1)
        return self.down(up * F.silu(gate))


class MadeUpBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm = MadeUpNorm(config.hidden_size)
        self.attention, self.mlp = MadeUpAttention(config, layer_idx), MadeUpMLP(config)

    def forward(self, x, mask, positions, cache):
        read = self.norm(x)
        return x + self.attention(read, mask, positions, cache) + self.mlp(read)


class MadeUpForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MadeUpConfig
    base_model_prefix = "decoder"
    _tied_weights_keys = {"head.weight": "embed.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(MadeUpBlock(config, n) for n in range(config.num_hidden_layers))
        self.norm = MadeUpNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def get_decoder(self):
        return self

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        labels=None,
        **options,
    ):
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache()
        seen = cache.get_seq_length() if cache is not None else 0
        time = x.shape[1]
        positions = torch.arange(seen, seen + time, device=x.device)
        mask = positions[:, None] >= torch.arange(seen + time, device=x.device)
        mask = mask[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, : seen + time].bool()
        for block in self.blocks:
            x = block(x, mask, positions[None], cache)
        logits = self.head(self.norm(x))
        loss = self.loss_function(logits, labels, self.config.vocab_size) if labels is not None else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)
