import os
import subprocess
import sys

import pytest
import tiny_models
import torch
from llmpruner_llama.family import LlamaFamily

from llmpruner import DataError
from llmpruner.discovery.groups import build_graph
from llmpruner.evaluation.costs import size, speed
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
    graph = graph_of(model, lambda: ())
    assert macs_per_token(model, graph, context=0) == attention + router + head + 2 * expert


def test_speed_is_measured_with_its_spread():
    model = tiny_models.llama()
    result = speed(model, prompt_tokens=16, new_tokens=4, runs=3)
    for measured in (result.prefill, result.decode):
        assert 0 < measured.low <= measured.median <= measured.high and measured.runs == 3
    assert (result.prompt_tokens, result.new_tokens) == (16, 4)
    if os.access("/proc/self/clear_refs", os.W_OK):
        assert result.peak_bytes > sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(
    "module", ["llmpruner.evaluation.metrics", "llmpruner.recovery.base", "llmpruner.recovery.strategies"]
)
def test_light_modules_import_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_speed_beyond_a_table_of_positions_is_refused():
    with pytest.raises(
        DataError, match=r"30 \+ 3 tokens are beyond the model's 32 positions; lower --set speed\.prompt_"
    ):
        speed(tiny_models.gpt2(positions=32), prompt_tokens=30, new_tokens=3, runs=1)
    assert speed(tiny_models.gpt2(positions=32), prompt_tokens=30, new_tokens=2, runs=1).new_tokens == 2
    rotary = tiny_models.llama()
    rotary.config.max_position_embeddings = 8
    assert speed(rotary, prompt_tokens=12, new_tokens=2, runs=1).prompt_tokens == 12
