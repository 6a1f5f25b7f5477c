"""The llama and vicuna families, held to the conformance class."""

from __future__ import annotations

from llmpruner_llama.family import LlamaFamily
from llmpruner_vicuna.family import VicunaFamily, VicunaV0Family
from transformers import LlamaConfig

from llmpruner.testing import FamilyConformance


def config(**changes) -> LlamaConfig:
    values = {
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 112,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**{**values, **changes})


class TestGroupedQuery(FamilyConformance):
    family = LlamaFamily

    def config(self) -> LlamaConfig:
        return config()


class TestMultiHeadTied(FamilyConformance):
    family = LlamaFamily

    def config(self) -> LlamaConfig:
        return config(num_key_value_heads=6, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)


class TestVicuna(FamilyConformance):
    family = VicunaFamily

    def config(self) -> LlamaConfig:
        made = config(num_key_value_heads=6)
        made._name_or_path = "lmsys/vicuna-7b-v1.5"
        return made


class TestVicunaV0(FamilyConformance):
    """With an odd vocabulary size, as v0's 32,001."""

    family = VicunaV0Family

    def config(self) -> LlamaConfig:
        made = config(num_key_value_heads=6, vocab_size=113, pad_token_id=112)
        made._name_or_path = "lmsys/vicuna-7b-v0"
        return made
