import tiny_models
import torch
from llmpruner_llama.family import LlamaFamily

from llmpruner.discovery.groups import build_graph
from llmpruner.evaluation.metrics import size
from llmpruner.models.generation import cache_argument
from llmpruner.models.meta import macs_per_token
from llmpruner.models.surgery import cut

FAMILY = LlamaFamily()


def test_sizes_of_a_pruned_model():
    model = tiny_models.llama(tied=True)
    graph = build_graph(FAMILY, model.config)
    dense = size(model, graph)
    graph = cut(model, graph, {"layers.0.mlp": range(40), "layers.1.attention": [0]}, FAMILY)
    pruned = size(model, graph)
    # Eight channels of three projections, and one KV head (with two query heads) of four.
    gone = 8 * 3 * 32 + (8 + 8 + 16 + 16) * 32
    assert dense.parameters - pruned.parameters == gone
    assert dense.decoder_parameters - pruned.decoder_parameters == gone
    assert dense.parameters - dense.decoder_parameters == 300 * 32 + 32
    assert dense.weight_bytes == 4 * dense.parameters


def test_macs_agree_with_the_profiler():
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import DynamicCache

    model = tiny_models.llama(tied=True)
    graph = build_graph(FAMILY, model.config)
    graph = cut(model, graph, {"layers.0.mlp": range(30), "layers.1.attention": [1]}, FAMILY)
    model.set_attn_implementation("eager")
    context = 24
    with torch.no_grad():
        cache = {cache_argument(model): DynamicCache(config=model.config)}
        model(torch.arange(context - 1)[None], use_cache=True, **cache)
        with FlopCounterMode(display=False) as counter:
            model(torch.tensor([[5]]), use_cache=True, **cache)
    # A multiply-accumulate is two operations.
    assert counter.get_total_flops() == 2 * macs_per_token(model, graph, context=context)


def test_experts_count_as_often_as_they_are_visited():
    from transformers import MixtralConfig, MixtralForCausalLM

    from llmpruner.models.meta import graph_of

    shape = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=300, num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2, **shape)
    model = MixtralForCausalLM(config)
    attention, router, head, expert = 32 * (32 + 16 + 16 + 32), 4 * 32, 300 * 32, 3 * 16 * 32
    graph = graph_of(model, ())
    assert macs_per_token(model, graph, context=0) == attention + router + head + 2 * expert
