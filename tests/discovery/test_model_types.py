"""The oracle on published architectures, none of which has code in discovery."""

from functools import cache

import pytest
from transformers import CONFIG_MAPPING, FalconConfig

from llmpruner.discovery.follow import Follow, FollowTable
from llmpruner.discovery.oracle import VERIFIED
from llmpruner.discovery.tiny import tiny_config
from llmpruner.discovery.verify import verify
from llmpruner.models.family import AutoFamily

UNITS, TOKENS = ("mlp", "attention"), ("vocabulary",)
REQUIRED = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen3", "gemma", "gemma3_text", "phi3", "glm", "glm4", "gptj", "falcon", "starcoder2",
         "stablelm", "olmo2", "cohere", "smollm3", "qwen3_moe"),
        UNITS,
    ),
    # Tied and untied, with a biased head, scaled embeddings and logits, experts.
    **dict.fromkeys(
        ("qwen2", "gemma2", "phi", "gpt2", "gpt_neox", "opt", "bloom", "granite", "mixtral", "olmoe"), (*UNITS, *TOKENS)
    ),
    # gemma3: the text part of a multimodal type.
    **dict.fromkeys(("cohere2", "gemma3"), TOKENS),
}  # fmt: skip
"""Model type → the kinds of units that are verified."""
LIKE = {"glm": "glm4", "smollm3": "mistral", "stablelm": "chapter 1 of the tutorial"}
"""Model type → where the same is verified."""


@cache
def verdicts(model_type):
    found = verify(AutoFamily(), CONFIG_MAPPING[model_type](), kinds=REQUIRED[model_type])
    return {verdict.kind: verdict for verdict in found}


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=pytest.mark.long) if name in LIKE else name for name in REQUIRED]
)
def test_cuts_of_well_known_types_equal_silencing(model_type):
    found = verdicts(model_type)
    assert {k: v.verdict for k, v in found.items()} == dict.fromkeys(REQUIRED[model_type], VERIFIED), found
    if "vocabulary" in found:
        done = set(found["vocabulary"].checks)
        assert {"uneven eager", "even eager", "cached generation", "save and load"} <= done


def test_attributes_and_tables_that_must_follow_are_found():
    verdict = verdicts("gpt2")["attention"]
    assert verdict.follows == (Follow("attention", "transformer.h.*.attn", "split_size"),)
    assert {"uneven eager", "uneven sdpa", "even sdpa", "cached generation", "save and load"} <= set(verdict.checks)
    tables = {(f.path, f.argument) for f in verdicts("bloom")["attention"].follows if isinstance(f, FollowTable)}
    assert ("transformer.h.*", "alibi") in tables


def test_key_value_heads_are_shrunk_whatever_a_configuration_calls_them():
    config = FalconConfig(new_decoder_architecture=True, hidden_size=4096, num_attention_heads=64, num_kv_heads=8)
    small = tiny_config(config)
    assert (small.num_attention_heads, small.num_kv_heads) == (6, 3)
    (verdict,) = verify(AutoFamily(), config, kinds=["attention"])
    assert (verdict.verdict, verdict.units) == (VERIFIED, 3), verdict.reason
