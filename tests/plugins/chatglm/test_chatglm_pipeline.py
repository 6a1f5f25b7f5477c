"""From an original checkpoint with its tokenizer through every stage: prune, save, load, recover, evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from chatglm_tiny import train_sentencepiece
from llmpruner_chatglm import ChatGLMFamily
from llmpruner_chatglm.tokenization_chatglm import ChatGLMTokenizer
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import llmpruner
from llmpruner.calibration.chat import chat_prompt
from llmpruner.evaluation.perplexity import perplexity
from llmpruner.models.generation import generate

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
