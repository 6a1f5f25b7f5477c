"""The oracle on published architectures, none of which has code in discovery."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING, FalconConfig

from llmpruner.discovery.family import AutoFamily
from llmpruner.discovery.follow import Follow, FollowTable
from llmpruner.discovery.groups import discover_graph
from llmpruner.discovery.oracle import VERIFIED
from llmpruner.discovery.tiny import small_config, tiny_config
from llmpruner.discovery.verify import verify
from llmpruner.errors import UnsupportedModelError
from llmpruner.structure.scope import Scope

REQUIRED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "glm", "glm4",
    "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "starcoder2", "stablelm", "olmo2", "granite",
    "cohere", "smollm3", "mixtral", "qwen3_moe", "olmoe",
)  # fmt: skip


def test_attributes_that_must_follow_are_found() -> None:
    (verdict,) = verify(AutoFamily(), CONFIG_MAPPING["gpt2"](), kinds=["attention"])
    assert verdict.verdict == VERIFIED, verdict.reason
    assert verdict.follows == (Follow("attention", "transformer.h.*.attn", "split_size"),)
    assert {"uneven eager", "uneven sdpa", "even sdpa", "cached generation", "save and load"} <= set(verdict.checks)


def test_alibi_slopes_stay_with_their_heads() -> None:
    (verdict,) = verify(AutoFamily(), CONFIG_MAPPING["bloom"](), kinds=["attention"])
    assert verdict.verdict == VERIFIED, verdict.reason
    tables = {(f.path, f.argument) for f in verdict.follows if isinstance(f, FollowTable)}
    assert ("transformer.h.*", "alibi") in tables


def test_key_value_heads_are_shrunk_whatever_a_configuration_calls_them() -> None:
    config = FalconConfig(new_decoder_architecture=True, hidden_size=4096, num_attention_heads=64, num_kv_heads=8)
    small = tiny_config(config)
    assert (small.num_attention_heads, small.num_kv_heads) == (6, 3)
    (verdict,) = verify(AutoFamily(), config, kinds=["attention"])
    assert (verdict.verdict, verdict.units) == (VERIFIED, 3), verdict.reason


@pytest.mark.slow
@pytest.mark.parametrize("model_type", REQUIRED)
def test_mlp_and_attention_of_well_known_types(model_type: str) -> None:
    verdicts = {v.kind: v for v in verify(AutoFamily(), CONFIG_MAPPING[model_type](), kinds=["mlp", "attention"])}
    assert {k: v.verdict for k, v in verdicts.items()} == {"mlp": VERIFIED, "attention": VERIFIED}, verdicts


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    [
        *["qwen2", "gemma2", "gpt2", "phi", "opt", "bloom", "mixtral", "granite", "cohere2", "olmoe", "gpt_neox"],
        *["gemma3"],
    ],
)
def test_tokens_of_well_known_types(model_type: str) -> None:
    """Tied and untied, with a biased head, scaled embeddings and logits, experts, and the text part of a multimodal
    type."""
    (verdict,) = verify(AutoFamily(), CONFIG_MAPPING[model_type](), kinds=["vocabulary"])
    assert verdict.verdict == VERIFIED, verdict
    assert {"uneven eager", "even eager", "cached generation", "save and load"} <= set(verdict.checks)


@pytest.mark.slow
def test_tokens_with_rows_of_several_tables_are_not_offered() -> None:
    graph = discover_graph(small_config(CONFIG_MAPPING["gemma3n_text"]()))
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens\.weight axis 0: token ids are read by ge in model"):
        Scope(("vocabulary",), (0,)).groups(graph)
