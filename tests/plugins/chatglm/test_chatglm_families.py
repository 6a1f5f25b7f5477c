"""The ChatGLM families: held to the conformance class, the choice of a family, and prompts; and from an original
checkpoint with its tokenizer through every stage: prune, save, load, recover, evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chatglm_tiny import tiny_config, train_sentencepiece
from llmpruner_chatglm import ChatGLM2Family, ChatGLM3Family, ChatGLMFamily, GlmFamily
from llmpruner_chatglm.configuration_chatglm import ChatGLMConfig
from llmpruner_chatglm.tokenization_chatglm import ChatGLMTokenizer
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GlmConfig

import llmpruner
from llmpruner import ATTENTION, MLP, ModelFamily, build_graph, load_catalog
from llmpruner.calibration.chat import chat_prompt, training_texts
from llmpruner.calibration.conversations import Conversation
from llmpruner.discovery.opening import family_for
from llmpruner.evaluation.perplexity import perplexity
from llmpruner.models.generation import generate
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


# Every stage


WORDS = "The quick brown fox jumps over the lazy dog. " * 12


def write_first_generation(directory: Path) -> None:
    marks = ["<n>", "<|tab|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<pad>"]
    vocabulary = train_sentencepiece(directory / "ice_text", "unigram", marks)
    ids = ChatGLMTokenizer(vocabulary).get_vocab()
    config = {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "vocab_size": len(ids) + 8, "hidden_size": 32,
        "num_layers": 3, "num_attention_heads": 4, "inner_hidden_size": 64, "max_sequence_length": 512,
        "bos_token_id": ids["<sop>"], "eos_token_id": ids["<eop>"], "mask_token_id": ids["[MASK]"],
        "gmask_token_id": ids["[gMASK]"], "pad_token_id": ids["<pad>"], "position_encoding_2d": True,
        "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": "modeling_chatglm.OfTheRelease"},
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    tokens = {"tokenizer_class": "ChatGLMTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_chatglm.Old", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokens))
    ChatGLMFamily().register_models()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    torch.save({k: v.half() for k, v in model.state_dict().items()}, directory / "pytorch_model.bin")


def write_third_generation(directory: Path) -> None:
    train_sentencepiece(directory / "tokenizer", "bpe", [])
    (directory / "tokenizer_config.json").write_text(json.dumps({"special": "<|user|>"}))
    hidden, heads, groups, size, width, vocabulary = 32, 4, 2, 8, 48, 640
    config = {
        "model_type": "chatglm", "hidden_size": hidden, "num_layers": 3, "num_attention_heads": heads,
        "kv_channels": size, "multi_query_attention": True, "multi_query_group_num": groups, "ffn_hidden_size": width,
        "padded_vocab_size": vocabulary, "seq_length": 128, "layernorm_epsilon": 1e-5, "add_qkv_bias": True,
        "rmsnorm": True, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    fused = (heads + 2 * groups) * size
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (vocabulary, hidden),
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (vocabulary, hidden),
    }
    for n in range(3):
        layer = f"transformer.encoder.layers.{n}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attention.query_key_value.weight": (fused, hidden),
            f"{layer}.self_attention.query_key_value.bias": (fused,),
            f"{layer}.self_attention.dense.weight": (hidden, heads * size),
            f"{layer}.mlp.dense_h_to_4h.weight": (2 * width, hidden),
            f"{layer}.mlp.dense_4h_to_h.weight": (hidden, width),
        }
    save_file({k: 0.1 * torch.randn(s).half() for k, s in shapes.items()}, directory / "model.safetensors")


CASES = {"chatglm": write_first_generation, "chatglm3": write_third_generation}


@pytest.mark.parametrize("family", CASES)
def test_every_stage(family: str, tmp_path: Path) -> None:
    source = tmp_path / "original"
    source.mkdir()
    CASES[family](source)
    loaded = llmpruner.load(source, trust_remote_code=True)  # code that is not there, and not needed
    assert loaded.family.name == family
    assert loaded.tokenizer is not None
    dense = loaded.graph.decoder_parameters

    pruned = llmpruner.prune(
        loaded, ratio=0.2, importance="taylor", layers="all", samples=4, length=12, output=tmp_path / "pruned"
    )
    assert pruned.graph.decoder_parameters == pytest.approx(0.8 * dense, rel=0.02)

    again = llmpruner.load(tmp_path / "pruned")
    assert again.family.name == family
    ids = torch.tensor([again.tokenizer("quick brown fox")["input_ids"]])
    with torch.no_grad():
        assert (again.network(ids).logits - pruned.network(ids).logits).abs().max() < 1e-5

    data = tmp_path / "data.json"
    row = {"instruction": "What jumps over the dog?", "output": "The quick brown fox"}
    data.write_text(json.dumps([row] * 8))
    recovered = llmpruner.recover(
        again, data=str(data), strategy="lora", settings={"lora": {"rank": 4}}, learning_rate=1e-2, max_steps=4,
        batch_size=4, work_dir=tmp_path / "work",
    )  # fmt: skip
    (training,) = recovered.record["recovery"]
    assert training["losses"][-1] < training["losses"][0]

    assert perplexity(recovered.network, again.tokenizer, WORDS, window=32).perplexity > 1
    asked = chat_prompt(again.family, again.tokenizer, "fox")
    assert isinstance(generate(recovered.network, again.tokenizer, asked.text), str) and not asked.has_special_tokens
