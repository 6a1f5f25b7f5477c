"""The ChatGLM families, held to the conformance class. ChatGLM2 and ChatGLM3 differ from GLM in their prompts alone."""

from __future__ import annotations

from typing import Any

from llmpruner_chatglm import ChatGLMFamily, GlmFamily
from transformers import Glm4Config, GlmConfig

from llmpruner.discovery.oracle import VERIFIED
from llmpruner.discovery.verify import check_kinds
from llmpruner.testing import FamilyConformance

GLM: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 64, "attention_bias": True,
    "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


class TestChatGLM(FamilyConformance):
    family = ChatGLMFamily

    def config(self):
        from llmpruner_chatglm.configuration_chatglm import ChatGLMConfig

        ChatGLMFamily().register_models()
        return ChatGLMConfig(
            vocab_size=128, hidden_size=48, num_layers=3, num_attention_heads=4, inner_hidden_size=88,
            max_sequence_length=64, bos_token_id=10, eos_token_id=11, mask_token_id=12, gmask_token_id=13,
            pad_token_id=3,
        )  # fmt: skip


class TestGlm(FamilyConformance):
    family = GlmFamily

    def config(self):
        return GlmConfig(**GLM)


def test_numbers_of_heads_follow_in_glm4_too() -> None:
    verdicts = check_kinds(GlmFamily(), Glm4Config(**GLM), kinds=("attention", "query"))
    assert [verdict.verdict for verdict in verdicts] == [VERIFIED, VERIFIED], verdicts
