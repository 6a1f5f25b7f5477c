"""The ChatGLM families, held to the conformance class."""

from __future__ import annotations

from llmpruner_chatglm.family import ChatGLM2Family, ChatGLM3Family, ChatGLMFamily, GlmFamily
from transformers import Glm4Config, GlmConfig

from llmpruner.testing import FamilyConformance


class TestChatGLM(FamilyConformance):
    family = ChatGLMFamily

    def config(self):
        from llmpruner_chatglm.configuration_chatglm import ChatGLMConfig

        ChatGLMFamily().register_models()
        return ChatGLMConfig(
            vocab_size=128,
            hidden_size=48,
            num_layers=3,
            num_attention_heads=4,
            inner_hidden_size=88,
            max_sequence_length=64,
            bos_token_id=10,
            eos_token_id=11,
            mask_token_id=12,
            gmask_token_id=13,
            pad_token_id=3,
        )


def glm_values() -> dict:
    return {
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "attention_bias": True,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }


class TestGlm(FamilyConformance):
    family = GlmFamily

    def config(self):
        return GlmConfig(**glm_values())


class TestGlm4(FamilyConformance):
    family = GlmFamily

    def config(self):
        return Glm4Config(**glm_values())


class TestChatGLM2(FamilyConformance):
    family = ChatGLM2Family

    def config(self):
        return GlmConfig(**glm_values(), chat_format="rounds")


class TestChatGLM3(FamilyConformance):
    family = ChatGLM3Family

    def config(self):
        return GlmConfig(**glm_values() | {"eos_token_id": [2, 65, 67]}, chat_format="roles")
