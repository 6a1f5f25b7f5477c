"""The llama family, held to the conformance class. Vicuna's families have its structure."""

from __future__ import annotations

from llmpruner_llama import LlamaFamily
from transformers import LlamaConfig

from llmpruner import build_graph
from llmpruner.testing import FamilyConformance

SIZES = {
    "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 6,
    "max_position_embeddings": 64,
}  # fmt: skip


class TestGroupedQuery(FamilyConformance):
    family = LlamaFamily

    def config(self) -> LlamaConfig:
        return LlamaConfig(**SIZES, vocab_size=112, num_key_value_heads=3)


class TestMultiHeadTied(FamilyConformance):
    """With an odd number of tokens, as Vicuna v0's 32,001."""

    family = LlamaFamily

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            **SIZES, vocab_size=113, pad_token_id=112, num_key_value_heads=6, tie_word_embeddings=True,
            attention_bias=True, mlp_bias=True,
        )  # fmt: skip


def test_rotary_frequencies_that_follow_the_length_of_the_text() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    plain, dynamic = (LlamaConfig(**SIZES, rope_parameters=parameters) for parameters in (None, rope))
    assert build_graph(LlamaFamily(), dynamic).groups == build_graph(LlamaFamily(), plain).groups
