"""The llama family, held to the conformance class (Vicuna's families have its structure); and the two tokenizers that
Meta ships, against the libraries that made them."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
import torch
from llama_cases import TOKENIZER, copy_of, set_param, write
from llmpruner_llama import LlamaFamily, MetaReader
from llmpruner_llama.meta_tokenizer import stop_tokens
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

import llmpruner
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


# Tokenizers


BYTE_FALLBACK = TOKENIZER.parents[2] / "tokenizer" / "tokenizer.model"
TEXTS = ["Hello world", "two  blanks \nand a line", "Übersetze 你好 „Hallo“ 🙂", "It's 12345 o'clock.\n\n\t x", ""]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""The pattern by which Llama 3 splits text before merging bytes (``Tokenizer.pat_str`` in Meta's code)."""
_MERGED = ("He", "ll", "Hell", "Hello", " w", " wo", "or", " wor", " worl", " world", "12", "123", "\n\n")
MERGES = [token.encode() for token in _MERGED]


@pytest.mark.parametrize("beside", [False, True])
def test_sentencepiece_in_the_folder_or_above(beside: bool, tmp_path: Path) -> None:
    folder = copy_of("mha", "1shard", tmp_path / "llama" / "7B")
    shutil.copyfile(BYTE_FALLBACK, (folder.parent if beside else folder) / "tokenizer.model")
    ours = MetaReader().read_tokenizer(folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(BYTE_FALLBACK))
    for text in TEXTS:
        assert ours(text)["input_ids"] == [1, *theirs.encode(text)]
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_id(), theirs.eos_id())


def llama3(folder: Path, **params: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    write(LlamaForCausalLM(LlamaConfig(vocab_size=600, num_hidden_layers=1, **sizes)), None, folder)
    set_param(folder, **params)
    ranks = [bytes([n]) for n in range(256)] + MERGES
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    return folder


def original(folder: Path) -> tiktoken.Encoding:
    lines = (folder / "tokenizer.model").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    return tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def test_tiktoken_gives_the_ids_of_tiktoken(tmp_path: Path) -> None:
    folder = llama3(tmp_path / "meta")
    ours, theirs = MetaReader().read_tokenizer(folder), original(folder)
    begin = len(MERGES) + 256
    for text in TEXTS:
        assert ours(text)["input_ids"] == [begin, *theirs.encode(text)]
        assert ours.decode(ours(text)["input_ids"], skip_special_tokens=True) == text
    assert len(theirs.encode("Hello world")) == 2
    assert len(ours) == begin + 256


def test_the_file_is_read_again_when_it_changed(tmp_path: Path) -> None:
    folder = llama3(tmp_path / "meta")
    assert len(MetaReader().read_tokenizer(folder)("Hello", add_special_tokens=False)["input_ids"]) == 1
    lines = (folder / "tokenizer.model").read_text().splitlines()
    (folder / "tokenizer.model").write_text("\n".join(lines[:256]) + "\n")
    assert len(MetaReader().read_tokenizer(folder)("Hello", add_special_tokens=False)["input_ids"]) == 5


@pytest.mark.parametrize("scaled", [False, True])
def test_special_tokens_of_llama_3_and_3_1(scaled: bool, tmp_path: Path) -> None:
    folder = llama3(tmp_path / "meta", rope_theta=500000.0, use_scaled_rope=scaled)
    tokenizer = MetaReader().read_tokenizer(folder)
    first = tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    offsets = {name: id - first for name, id in tokenizer.get_vocab().items() if id >= first}
    assert offsets["<|end_of_text|>"] == 1
    assert offsets["<|start_header_id|>"] == 6
    assert offsets["<|eot_id|>"] == 9
    assert offsets["<|reserved_special_token_1|>"] == 3
    # llama3/tokenizer.py of Meta, and models/llama3/tokenizer.py of llama-models.
    assert offsets["<|reserved_special_token_2|>"] == (5 if scaled else 4)
    assert ("<|finetune_right_pad_id|>" in offsets) == ("<|eom_id|>" in offsets) == scaled
    assert sorted(offsets.values()) == list(range(256))
    ids = tokenizer("a<|eot_id|>b", add_special_tokens=False)["input_ids"]
    assert ids == [ord("a"), first + 9, ord("b")]
    assert stop_tokens(tokenizer) == [first + n for n in ((1, 9, 8) if scaled else (1, 9))]


@pytest.mark.parametrize(("kind", "begin", "end"), [("sentencepiece", 1, 2), ("tiktoken", 269, [270, 278])])
def test_a_tokenizer_survives_the_conversion(kind: str, begin: int, end: object, tmp_path: Path) -> None:
    if kind == "tiktoken":
        folder = llama3(tmp_path / "meta", rope_theta=500000.0)
    else:
        folder = copy_of("mha", "2shards", tmp_path / "meta", tokenizer=True)
    llmpruner.export(folder, to="stock", output=tmp_path / "hf")
    before, after = MetaReader().read_tokenizer(folder), AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        assert after(text)["input_ids"] == before(text)["input_ids"]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert after("Hello")["input_ids"][0] == after.bos_token_id == config["bos_token_id"] == begin
    assert after.eos_token_id == config["eos_token_id"] == begin + 1
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == end
    if kind == "sentencepiece":
        assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()
