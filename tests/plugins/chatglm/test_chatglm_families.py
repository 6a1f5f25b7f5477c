"""The ChatGLM families: held to the conformance class, the choice of a family, and prompts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from chatglm_tiny import tiny_config
from llmpruner_chatglm import ChatGLM2Family, ChatGLM3Family, ChatGLMFamily, GlmFamily
from llmpruner_chatglm.configuration_chatglm import ChatGLMConfig
from transformers import GlmConfig

from llmpruner import ATTENTION, MLP, ModelFamily, build_graph, load_catalog
from llmpruner.calibration.chat import chat_prompt, training_texts
from llmpruner.calibration.conversations import Conversation
from llmpruner.discovery.opening import family_for
from llmpruner.testing import FamilyConformance

GLM: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 64, "attention_bias": True,
    "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


class TestChatGLM(FamilyConformance):
    family = ChatGLMFamily

    def config(self):
        ChatGLMFamily().register_models()
        return ChatGLMConfig(
            vocab_size=128, hidden_size=48, num_layers=3, num_attention_heads=4, inner_hidden_size=88,
            max_sequence_length=64, bos_token_id=10, eos_token_id=11, mask_token_id=12, gmask_token_id=13,
            pad_token_id=3,
        )  # fmt: skip


class TestGlm(FamilyConformance):
    """ChatGLM2 and ChatGLM3 differ from GLM in their prompts alone."""

    family = GlmFamily

    def config(self):
        return GlmConfig(**GLM)


def test_hidden_channels_of_chatglm_are_not_offered() -> None:
    graph = build_graph(ChatGLMFamily(), tiny_config("chatglm"))
    assert graph.kinds == (ATTENTION, MLP, "vocabulary", "layer")
    assert graph.layers == "transformer.layers"


def test_later_generations_win_over_glm_by_their_config() -> None:
    catalog = load_catalog()
    assert family_for(catalog, tiny_config("chatglm")).name == "chatglm"
    assert family_for(catalog, tiny_config("glm")).name == family_for(catalog, tiny_config("glm4")).name == "glm"
    assert family_for(catalog, tiny_config("glm", chat_format="rounds")).name == "chatglm2"
    assert family_for(catalog, tiny_config("glm", chat_format="roles")).name == "chatglm3"


def test_prompts_of_each_generation() -> None:
    for family, expected, after_system in (
        (ChatGLMFamily, "你好[gMASK]<sop>", "Be brief.\n\n你好[gMASK]<sop>"),
        (ChatGLM2Family, "[Round 1]\n\n问：你好\n\n答：", "Be brief.\n\n[Round 1]\n\n问：你好\n\n答："),
        (ChatGLM3Family, "<|user|>\n 你好<|assistant|>", "<|system|>\n Be brief.<|user|>\n 你好<|assistant|>"),
        (GlmFamily, "<|user|>\n你好<|assistant|>", "<|system|>\nBe brief.<|user|>\n你好<|assistant|>"),
    ):
        assert chat_prompt(family(), None, "你好") == (expected, False)
        assert family.chat_format.format_conversation([("你好", "ho")], "Be brief.")[0][0] == after_system


def marked(eos: str) -> Any:
    """As a tokenizer."""
    return SimpleNamespace(chat_template=None, eos_token=eos)


LATER = {
    ChatGLMFamily: ("<eop>", "[Round 0]\n问：q1\n答：a1\n[Round 1]\n问：q2\n答：[gMASK]<sop>"),
    ChatGLM2Family: ("</s>", "[Round 1]\n\n问：q1\n\n答：a1\n\n[Round 2]\n\n问：q2\n\n答："),
    ChatGLM3Family: ("</s>", "<|user|>\n q1<|assistant|>\n a1<|user|>\n q2<|assistant|>"),
    GlmFamily: ("<|endoftext|>", "<|user|>\nq1<|assistant|>\na1<|user|>\nq2<|assistant|>"),
}


@pytest.mark.parametrize("family", LATER)
def test_later_questions_of_a_conversation_are_asked_as_published(family: type[ModelFamily]) -> None:
    eos, expected = LATER[family]
    for answer in ("a1", "\n a1 "):
        assert chat_prompt(family(), marked(eos), "q2", [("q1", answer)]) == (expected, False)


@pytest.mark.parametrize("family", LATER)
def test_conversations_are_trained_on_as_they_are_asked(family: type[ModelFamily]) -> None:
    eos, expected = LATER[family]
    exchanges = (("q1", "a1"), ("q2", "a2"))
    texts = training_texts(Conversation(exchanges), family(), marked(eos))
    gap = family.chat_format.answer_separator
    closed = ["".join(a + b for a, b in text.turns) for text in texts]
    whole = f"{expected}{gap}a2{eos}"
    if family in (ChatGLMFamily, ChatGLM2Family):
        assert closed == [f"{chat_prompt(family(), None, 'q1').text}{gap}a1{eos}", whole]
        assert [answer for text in texts for _, answer in text.turns] == [f"{gap}a1{eos}", f"{gap}a2{eos}"]
    else:
        assert closed == [whole]
        assert [answer for _, answer in texts[0].turns] == [f"{gap}a1", f"{gap}a2{eos}"]
    system = training_texts(Conversation(exchanges, "Brief."), family(), marked(eos))
    assert all(text.turns[0][0].startswith(family.chat_format.format_system("Brief.")) for text in system)
