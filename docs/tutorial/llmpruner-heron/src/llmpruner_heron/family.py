from __future__ import annotations

from llmpruner import ATTENTION, HIDDEN, LAYER, MLP, Blocks, ChatFormat, CoupledGroup, ModelFamily, Role, Span, layouts


class HeronFormat(ChatFormat):
    def format_prompt(self, question):
        return f"<visitor> {question}\n<heron> "


class HeronFamily(ModelFamily):
    name = "heron"
    summary = "Heron, the made-up model of the tutorial"
    model_types = ("heron",)
    chat_format = HeronFormat()

    def register_models(self):
        from transformers import AutoConfig, AutoModelForCausalLM

        from .modeling_heron import HeronConfig, HeronForCausalLM

        AutoConfig.register("heron", HeronConfig, exist_ok=True)
        AutoModelForCausalLM.register(HeronConfig, HeronForCausalLM, exist_ok=True)

    def coupled_groups(self, config):
        blocks = [f"blocks.{n}" for n in range(config.num_hidden_layers)]
        groups = []
        for n, block in enumerate(blocks):
            groups += [self._attention(config, n, block), self._mlp(config, n, block)]
        groups.append(self._hidden(config, blocks))
        groups.append(CoupledGroup("layers", LAYER, len(blocks)))
        return groups

    def _attention(self, config, n, block):
        """A unit is one head: 3·head_dim rows of ``qkv``, head_dim columns of ``out``, and one ALiBi slope."""
        heads = config.num_attention_heads
        head_dim = config.hidden_size // heads
        spans = (
            Span(f"{block}.attention.qkv.weight", 0, Role.PRODUCES, Blocks(heads, 3 * head_dim)),
            Span(f"{block}.attention.qkv.bias", 0, Role.PRODUCES, Blocks(heads, 3 * head_dim)),
            Span(f"{block}.attention.out.weight", 1, Role.CONSUMES, Blocks(heads, head_dim)),
        )
        slopes = Span(f"{block}.attention.slopes", 0, Role.PRODUCES, Blocks(heads))
        return CoupledGroup("attention", ATTENTION, heads, spans, buffers=(slopes,), layer=n)

    def _mlp(self, config, n, block):
        """A unit is one channel: a row of ``up`` with its bias, and a column of ``down``."""
        spans = layouts.two_layer_mlp(f"{block}.up", f"{block}.down", config.inner_size)
        return CoupledGroup("mlp", MLP, config.inner_size, spans, layer=n)

    def _hidden(self, config, blocks):
        """A unit is one channel of the residual stream, all the way from the embedding to the head."""
        producers = [f"{block}.{module}" for block in blocks for module in ("attention.out", "down")]
        spans = layouts.hidden_channels(
            config.hidden_size,
            embeddings=["embed"],
            consumers=[*(f"{b}.{module}" for b in blocks for module in ("attention.qkv", "up")), "head"],
            producers=producers,
            biased=producers,
            norms=[*(f"{b}.{norm}" for b in blocks for norm in ("norm_1", "norm_2")), "norm"],
        )
        return CoupledGroup("hidden", HIDDEN, config.hidden_size, spans)

    def refresh(self, model):
        for block in model.blocks:
            attention = block.attention
            attention.num_heads = attention.qkv.out_features // (3 * attention.head_dim)
