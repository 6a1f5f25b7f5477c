"""Speed: what steps cost, the order of the runs, and what is refused before a model is loaded."""

import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import tiny_models
import torch
from llmpruner_llama import LlamaFamily
from llmpruner_vllm import VllmRuntime, VllmSession
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

import llmpruner
from llmpruner import BenchSubject, LlmprunerError, LoadSettings, Runtime, Session, Work, load_catalog
from llmpruner.discovery.cut import cut
from llmpruner.discovery.groups import build_graph
from llmpruner.discovery.opening import Opener
from llmpruner.evaluation.bench import TorchSession, bench, measurement, work_of
from llmpruner.models.meta import graph_of, macs_per_token
from llmpruner.progress import QUIET
from llmpruner.settings import BenchSettings

FAMILY = LlamaFamily()


def small(**options):
    model = tiny_models.llama(**options)
    return model, build_graph(FAMILY, model.config)


# What steps cost


def test_work_agrees_with_the_profiler():
    model, graph = small(tied=True)
    graph = cut(model, graph, {"layers.0.mlp": range(30), "layers.1.attention": [1]}, FAMILY)
    model.set_attn_implementation("eager")
    work, tokens = work_of(model, graph), 24
    session = TorchSession(model)
    for _ in range(2):  # a second start forgets the first
        session.start()
        with FlopCounterMode(display=False) as prefill:
            session.prefill(torch.arange(tokens)[None])
    with FlopCounterMode(display=False) as step:
        session.decode(1)
    # Eager attention also multiplies what the causal mask hides. A multiply-accumulate is two operations.
    hidden = work.pair_macs * tokens * (tokens - 1) // 2
    assert prefill.get_total_flops() == 2 * (work.prefill(tokens) + hidden)
    assert step.get_total_flops() == 2 * macs_per_token(model, graph, context=tokens + 1)


def test_bytes_of_a_decoding_step():
    model, graph = small()
    work = work_of(model, graph)
    # The embedding is looked up, and norms are not matrices.
    read = sum(p.nbytes for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    assert work.weight_bytes == read and not work.routed_bytes
    assert work.cache_bytes == 2 * 2 * 2 * 8 * 4  # keys and values of two layers with two heads of 8, in float32
    assert work.decode(3, 10) == read + 3 * 10 * work.cache_bytes
    assert Work(1, 1, 1, 1).decode(1, 1) is None


def test_experts_count_as_often_as_they_are_visited():
    shape = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=300, num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2, **shape)
    model = MixtralForCausalLM(config)
    attention, router, head, expert = 32 * (32 + 16 + 16 + 32), 4 * 32, 300 * 32, 3 * 16 * 32
    assert macs_per_token(model, graph_of(model, ()), context=0) == attention + router + head + 2 * expert
    work = Work(0, 0, 0, weight_bytes=100, routed_bytes={0.25: 1000}, cache_bytes=0)
    assert work.decode(1, 0) == 100 + 250
    assert work.decode(2, 0) == 100 + 1000 * (1 - 0.75**2)


# Runs


class Scripted(Session):
    """Takes as many seconds as it is told."""

    vocabulary, dtype, now = 50, "none", 0.0

    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log = name, iter(seconds), log

    def start(self):
        self.log.append(self.name)

    def prefill(self, tokens):
        self.log.append(tokens.tolist())
        Scripted.now += next(self.seconds)

    def decode(self, count):
        self.log.append(count)
        Scripted.now += next(self.seconds)

    def close(self):
        self.log.append(f"{self.name} closed")


class Script(Runtime):
    name = "script"

    def __init__(self, sessions):
        super().__init__()
        self.sessions = sessions

    def open(self, subject):
        weights = {"dense": 100, "pruned": 50}[subject.ref]
        return self.sessions[subject.ref], Work(weights, 0, 0, weights, cache_bytes=0)


def test_models_run_in_turn_and_are_compared_within_a_round(monkeypatch):
    log = []
    monkeypatch.setattr("llmpruner.evaluation.bench.perf_counter", lambda: Scripted.now)
    sessions = {
        # Prefill and decoding of the round that is not counted, and of two that are, in which the machine slows down.
        "dense": Scripted("dense", [99, 99, 10, 40, 20, 80], log),
        "pruned": Scripted("pruned", [99, 99, 5, 25, 10, 50], log),
    }
    opener = Opener(load_catalog(), LoadSettings(), QUIET)
    subjects = [BenchSubject(name, None, 2, 9, name, opener) for name in ("dense", "pruned")]
    result = bench(subjects, Script(sessions), BenchSettings(batch=2, prompt=5, new=4, rounds=2))
    started = [entry for entry in log if entry in ("dense", "pruned")]
    assert started == ["dense", "pruned", "pruned", "dense", "dense", "pruned"]
    prompts = [entry for entry in log if isinstance(entry, list)]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3] and [len(row) for row in prompts[0]] == [5, 5]
    assert log[-2:] == ["pruned closed", "dense closed"]
    (case,) = result.cases
    dense, pruned = case.models
    assert (dense.name, pruned.name) == ("dense", "pruned")
    assert dense.prefill.tokens_per_second == measurement([1, 0.5]) and dense.prefill.speedup.median == 1
    assert pruned.prefill.speedup == measurement([2, 2])
    assert pruned.prefill.ideal == 2 and pruned.prefill.share_of_ideal == 1
    assert pruned.decode.tokens_per_second == measurement([0.32, 0.16])
    assert pruned.decode.speedup.median == pytest.approx(1.6) and pruned.decode.share_of_ideal == pytest.approx(0.8)
    written = result.as_json()["cases"][0]["models"][1]
    assert written["name"] == "pruned" and written["decode"]["share_of_ideal"] == pytest.approx(0.8)


def test_median_and_quartiles():
    found = measurement([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (found.median, found.lower_quartile, found.upper_quartile) == (3, 2, 4)
    assert measurement([7.0]).lower_quartile == measurement([7.0]).upper_quartile == 7


# Refusals


def test_what_a_runtime_cannot_run(tmp_path):
    tiny_models.llama().save_pretrained(tmp_path / "dense")
    message = "llama-cpp-python is not installed|is no .gguf file, which --runtime llama-cpp needs"
    with pytest.raises(LlmprunerError, match=message):
        llmpruner.bench(tmp_path / "dense", runtime="llama-cpp")


def test_vllm_forgets_earlier_prompts(monkeypatch):
    """It keeps what it computed, and the prompts of all cases begin with the same tokens."""
    engine = Mock()
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda **_: engine, SamplingParams=dict))
    session = VllmSession(SimpleNamespace(path="dense", length=8, batch=1), 10, "bfloat16", VllmRuntime.Settings())
    session.start()
    session.prefill(torch.tensor([[1, 2]]))
    session.decode(3)
    prompts = [{"prompt_token_ids": [1, 2]}]
    assert [name for name, *_ in engine.mock_calls] == ["reset_prefix_cache", "generate", "generate"]
    told = [(given, options["max_tokens"]) for (given, options), _ in engine.generate.call_args_list]
    assert told == [(prompts, 1), (prompts, 4)]


def test_a_loaded_model_is_measured_as_it_is(tmp_path):
    dense = tmp_path / "dense"
    tiny_models.llama().save_pretrained(dense)
    model = llmpruner.load(dense, dtype="bfloat16")
    result = llmpruner.bench([model, dense], batch=1, prompt=[4, 8], new=2, rounds=1)
    assert result.dtypes == ("bfloat16", "float32") and [case.prompt_tokens for case in result.cases] == [4, 8]
    # Halving the bytes doubles the ideal of decoding, and changes no number of operations.
    _, stored = result.cases[0].models
    assert stored.decode.ideal == pytest.approx(0.5) and stored.prefill.ideal == 1
