"""A decoder composed of interchangeable parts, unlike any published one: what discovery has never seen."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class ComposedConfig(PreTrainedConfig):
    """``qkv``: *separate*, *concatenated* (all q, all k, all v), *interleaved* (per KV head its queries, key,
    value) or *backwards* (per KV head value, key, queries). ``mlp``: *plain*, *gated*, *packed* (gate first),
    *swapped* (up first) or *woven* (gate and up rows alternate). ``norm``: *rms*, *offset* (1 + weight) or
    *layer*. ``rotary``: rotated share of every head. ``parallel``: attention and MLP read the same input.
    ``scaled``: a computed buffer, which is not saved, scales the MLP channels. ``linear``: numbers of the layers that
    have linear attention instead, with numbers and sizes of heads of their own; ``linear_qkv``: *separate* or
    *concatenated* projections; ``convolved``: a depthwise convolution over time runs over them.
    """

    model_type = "composed"

    vocab_size: int = 96
    hidden_size: int = 48
    num_hidden_layers: int = 2
    num_attention_heads: int = 6
    num_key_value_heads: int = 3
    head_dim: int = 16
    intermediate_size: int = 40
    qkv: str = "separate"
    mlp: str = "gated"
    norm: str = "rms"
    rotary: float = 0.5
    parallel: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norm: bool = False
    transposed: bool = False
    tie_word_embeddings: bool = False
    scaled: bool = False
    linear: tuple[int, ...] = ()
    linear_key_heads: int = 4
    linear_value_heads: int = 8
    linear_head_dim: int = 8
    linear_qkv: str = "concatenated"
    convolved: bool = True


class Projection(nn.Module):
    """A linear layer whose weight is [in, out] when ``transposed``, as in GPT-2."""

    def __init__(self, inputs, outputs, bias, transposed):
        super().__init__()
        self.transposed = transposed
        # Not drawn at random: see `ComposedForCausalLM._init_weights`.
        self.weight = nn.Parameter(torch.zeros(inputs, outputs) if transposed else torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x):
        if not self.transposed:
            return F.linear(x, self.weight, self.bias)
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.Module):
    def __init__(self, size, offset=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size) - offset)
        self.offset, self.eps = offset, 1e-5

    def forward(self, x):
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return scaled * (self.offset + self.weight) if self.offset else scaled * self.weight


def make_norm(config):
    if config.norm == "layer":
        return nn.LayerNorm(config.hidden_size)
    return RMSNorm(config.hidden_size, 1.0 if config.norm == "offset" else 0.0)


def rotate(x, share):
    """Rotary embedding of the first ``share`` of every head; x: [batch, heads, time, head_dim]."""
    size = int(x.shape[-1] * share) // 2 * 2
    if not size:
        return x
    frequencies = 1e4 ** (-torch.arange(0, size, 2, dtype=torch.float32, device=x.device) / size)
    angles = torch.outer(torch.arange(x.shape[-2], dtype=torch.float32, device=x.device), frequencies)
    cos, sin = (torch.cat([f, f], -1) for f in (angles.cos(), angles.sin()))
    turned, rest = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.kind, self.rotary = config.head_dim, config.qkv, config.rotary
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        make = (config.qkv_bias, config.transposed)
        if self.kind == "separate":
            self.q = Projection(config.hidden_size, q, *make)
            self.k = Projection(config.hidden_size, kv, *make)
            self.v = Projection(config.hidden_size, kv, *make)
        else:
            self.qkv = Projection(config.hidden_size, q + 2 * kv, *make)
        self.out = Projection(q, config.hidden_size, config.out_bias, config.transposed)
        self.q_norm = RMSNorm(config.head_dim) if config.head_norm else nn.Identity()

    def split(self, x):
        d, k = self.head_dim, self.kv_heads
        if self.kind == "separate":
            q, key, v = self.q(x), self.k(x), self.v(x)
        elif self.kind == "concatenated":
            q, key, v = self.qkv(x).split([self.heads * d, k * d, k * d], -1)
        else:
            queries = self.heads // k
            grid = self.qkv(x).unflatten(-1, (k, queries + 2, d))
            if self.kind == "interleaved":
                q, key, v = grid[..., :queries, :], grid[..., queries, :], grid[..., queries + 1, :]
            else:
                v, key, q = grid[..., 0, :], grid[..., 1, :], grid[..., 2:, :]
            q, key, v = q.flatten(-3), key.flatten(-2), v.flatten(-2)
        return (
            q.unflatten(-1, (self.heads, d)).transpose(1, 2),
            key.unflatten(-1, (k, d)).transpose(1, 2),
            v.unflatten(-1, (k, d)).transpose(1, 2),
        )

    def forward(self, x):
        q, k, v = self.split(x)
        q, k = rotate(self.q_norm(q), self.rotary), rotate(k, self.rotary)
        shared = self.heads // self.kv_heads
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        time = x.shape[1]
        mask = torch.full((time, time), -1e9, device=x.device).triu(1)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(self.head_dim) + mask).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(-2))


CHUNK = 4


class LinearAttention(nn.Module):
    """Attention without a softmax, whose output is written one chunk of positions after the other: a state that sums
    products of keys and values, and the products inside the chunk. A gate scales what each value head adds."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.linear_head_dim
        self.keys, self.values = (n * self.head_dim for n in (config.linear_key_heads, config.linear_value_heads))
        sizes = (self.keys, self.keys, self.values)
        make = (config.qkv_bias, config.transposed)
        if config.linear_qkv == "separate":
            self.parts = nn.ModuleList(Projection(config.hidden_size, n, *make) for n in sizes)
        else:
            self.parts = None
            self.qkv = Projection(config.hidden_size, sum(sizes), *make)
        self.filter = nn.Parameter(torch.zeros(sum(sizes), 1, 3)) if config.convolved else None
        self.gate = Projection(config.hidden_size, config.linear_value_heads, True, config.transposed)
        self.out = Projection(self.values, config.hidden_size, config.out_bias, config.transposed)

    def forward(self, x):
        mixed = self.qkv(x) if self.parts is None else torch.cat([part(x) for part in self.parts], -1)
        if self.filter is not None:
            mixed = F.conv1d(mixed.transpose(1, 2), self.filter, padding=2, groups=len(self.filter))
            mixed = F.silu(mixed[..., : x.shape[1]]).transpose(1, 2)
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in mixed.split([self.keys, self.keys, self.values], -1)
        )
        q, k = (part.repeat_interleave(v.shape[1] // part.shape[1], 1) for part in (F.normalize(q, dim=-1), k))
        v = v * self.gate(x).sigmoid().transpose(1, 2).unsqueeze(-1)
        written = torch.zeros_like(v)
        state = torch.zeros(*v.shape[:2], self.head_dim, self.head_dim, device=x.device)
        for start in range(0, x.shape[1], CHUNK):
            now = slice(start, start + CHUNK)
            inside = (q[:, :, now] @ k[:, :, now].transpose(-1, -2)).tril()
            written[:, :, now] = q[:, :, now] @ state + inside @ v[:, :, now]
            state = state + k[:, :, now].transpose(-1, -2) @ v[:, :, now]
        return self.out(written.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        make = (config.mlp_bias, config.transposed)
        rows = config.intermediate_size
        if self.kind in ("plain", "gated"):
            self.up = Projection(config.hidden_size, rows, *make)
        if self.kind == "gated":
            self.gate = Projection(config.hidden_size, rows, *make)
        if self.kind in ("packed", "swapped", "woven"):
            self.both = Projection(config.hidden_size, 2 * rows, *make)
        self.down = Projection(rows, config.hidden_size, *make)
        scale = torch.linspace(0.2, 2.0, rows) if config.scaled else None
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x):
        if self.kind == "plain":
            return self.down(F.gelu(self.up(x)))
        if self.kind == "gated":
            scale = 1.0 if self.scale is None else self.scale
            return self.down(F.silu(self.gate(x)) * self.up(x) * scale)
        both = self.both(x)
        if self.kind == "woven":
            gate, up = both.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            gate, up = both.chunk(2, -1)
        if self.kind == "swapped":
            gate, up = up, gate
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.parallel = config.parallel
        self.attention = LinearAttention(config) if number in config.linear else Attention(config)
        self.mlp = MLP(config)
        self.norm_1 = make_norm(config)
        self.norm_2 = None if config.parallel else make_norm(config)

    def forward(self, x):
        read = self.norm_1(x)
        if self.norm_2 is None:
            return x + self.attention(read) + self.mlp(read)
        x = x + self.attention(read)
        return x + self.mlp(self.norm_2(x))


class ComposedForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = ComposedConfig
    base_model_prefix = "decoder"
    _tied_weights_keys = {"head.weight": "embed.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(
            config.vocab_size, config.hidden_size, _weight=torch.zeros(config.vocab_size, config.hidden_size)
        )
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        """Tests give all weights values of their own; drawing some here takes a third of their time (on meta, too)."""

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def get_decoder(self):
        return self

    def forward(self, input_ids, **_):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutputWithPast(logits=self.head(self.norm(x)))


AutoConfig.register("composed", ComposedConfig, exist_ok=True)
AutoModelForCausalLM.register(ComposedConfig, ComposedForCausalLM, exist_ok=True)
