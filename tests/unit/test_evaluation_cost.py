import json

import pytest
import tiny_models
import torch
from llmpruner_llama.family import LlamaFamily

from llmpruner.evaluation import Evaluation, Measurement, PerplexityResult, Size, Speed, side_by_side
from llmpruner.evaluation.cost import size, speed
from llmpruner.families.graph import build_graph
from llmpruner.models.arithmetic import macs_per_token
from llmpruner.models.decoding import cache_argument
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

    from llmpruner.models.decoder import graph_of

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
    assert result.peak_bytes is None or result.peak_bytes > sum(p.nbytes for p in model.parameters())


def test_evaluations_side_by_side_and_as_json():
    spread = Measurement(10.0, 9.0, 11.0, 5)
    dense = Evaluation(
        "dense",
        Size(100, 80, 400, 90, 512),
        PerplexityResult(25.6, 3.24, 1.2, 512, 1, 512, "0"),
        {"piqa": {"acc": 0.66, "acc_stderr": 0.05}},
        Speed(spread, spread, 16, 4, None),
    )
    broken = PerplexityResult(float("inf"), 900.0, 300.0, 512, 1, 512, "0")
    pruned = Evaluation("pruned", Size(90, 70, 360, 80, 512), broken)
    lines = {line.label: line for line in side_by_side([dense, pruned])}
    assert lines["parameters"].values == (100, 90)
    assert lines["perplexity"].values == (25.6, float("inf")) and not lines["perplexity"].higher_is_better
    assert lines["piqa acc"].values == (0.66, None) and lines["piqa acc"].errors == (0.05, None)
    assert lines["decode tokens/s"].values == (10.0, None) and lines["decode tokens/s"].higher_is_better
    assert "peak memory bytes" not in lines
    loaded = json.loads(json.dumps([dense.as_json(), pruned.as_json()], allow_nan=False))
    assert loaded[0]["speed"]["decode"]["median"] == 10.0
    assert loaded[1]["perplexity"]["perplexity"] is None and loaded[1]["speed"] is None


@pytest.mark.parametrize("module", ["llmpruner.evaluation", "llmpruner.recovery.base", "llmpruner.recovery.lora"])
def test_light_modules_import_no_torch(module):
    import subprocess
    import sys

    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
