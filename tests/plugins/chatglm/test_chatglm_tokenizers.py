"""The tokenizers of all generations, on vocabularies trained here."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from chatglm_tiny import DATA, train_sentencepiece
from llmpruner_chatglm import ChatGLM2Family, ChatGLM3Family, ChatGLMFamily, ChatGLMReader
from llmpruner_chatglm.original import chat_format, read_tokenizer
from llmpruner_chatglm.tokenization_chatglm import ChatGLMTokenizer
from transformers import AutoTokenizer

from llmpruner import CheckpointError
from llmpruner.calibration.chat import chat_prompt

BLANKS = [f"<|blank_{k}|>" for k in range(2, 81)]
PIECES = ["<n>", "<|tab|>", *BLANKS, "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<pad>"]
ODD = ["", " ", "a", " lead and trail ", "two  blanks\tand\n\nlines", "你好，世界！", "rare 🦊 ligature ﬁ"]
ODD.append("x" + " " * 200 + "y")


@pytest.fixture(scope="module")
def ice_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("v1") / "ice_text", "unigram", PIECES, size=600)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("v2") / "tokenizer", "bpe", [], size=500)


def test_a_prompt_is_followed_by_gmask_and_sop(ice_text: Path) -> None:
    tokenizer = ChatGLMTokenizer(ice_text)
    piece = sentencepiece.SentencePieceProcessor(model_file=str(ice_text))
    marks = [piece.piece_to_id("[gMASK]"), piece.piece_to_id("<sop>")]
    ids = tokenizer("你好")["input_ids"]
    assert ids == piece.encode("你好") + marks
    assert tokenizer("你好", add_special_tokens=False)["input_ids"] == piece.encode("你好")
    assert tokenizer("你好", "世界")["input_ids"] == [*ids, *piece.encode("世界"), piece.piece_to_id("<eop>")]
    assert tokenizer(chat_prompt(ChatGLMFamily(), tokenizer, "你好").text)["input_ids"] == ids
    assert (tokenizer.gmask_token_id, tokenizer.bos_token_id) == tuple(marks)
    assert tokenizer.eos_token == "<eop>"
    assert tokenizer.pad_token_id == piece.piece_to_id("<pad>")


def test_white_space_has_pieces_of_its_own(ice_text: Path) -> None:
    tokens = ChatGLMTokenizer(ice_text).tokenize("fox\n\tover  it" + " " * 83 + "end")
    assert {"<n>", "<|tab|>", "<|blank_2|>", "<|blank_80|>", "<|blank_3|>"} <= set(tokens)


@pytest.mark.parametrize("text", ODD)
def test_text_survives_encoding_and_decoding(ice_text: Path, text: str) -> None:
    tokenizer = ChatGLMTokenizer(ice_text)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids)) == ids


def test_batches_are_padded_on_the_left(ice_text: Path) -> None:
    tokenizer = ChatGLMTokenizer(ice_text)
    batch = tokenizer(["fox", "The quick brown fox"], padding=True)
    assert batch["attention_mask"][0][0] == 0
    assert batch["input_ids"][0][0] == tokenizer.pad_token_id
    assert batch["input_ids"][0][-1] == batch["input_ids"][1][-1] == tokenizer.bos_token_id


def test_saved_tokenizer_comes_back_through_auto_tokenizer(ice_text: Path, tmp_path: Path) -> None:
    ChatGLMFamily().register_models()
    tokenizer = ChatGLMTokenizer(ice_text)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(again) is ChatGLMTokenizer
    assert again.padding_side == "left"
    for text in ODD:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("roles", [False, True], ids=["chatglm2", "chatglm3"])
def test_fast_tokenizer_equals_sentencepiece(bpe: Path, roles: bool) -> None:
    config = bpe.parent / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "<|user|>"} if roles else {}))
    piece = sentencepiece.SentencePieceProcessor(model_file=str(bpe))
    size = piece.get_piece_size()
    tokenizer: Any = read_tokenizer(bpe.parent)
    assert chat_format(bpe.parent) == ("roles" if roles else "rounds")
    assert len(tokenizer) == size + (9 if roles else 5)
    for text in ODD:
        ids = tokenizer(text)["input_ids"]
        assert ids == [size + 1, size + 3, *piece.encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert "philosophy" in tokenizer.decode(tokenizer("philosophy")["input_ids"])
    assert tokenizer("philosophy", add_special_tokens=False)["input_ids"] == piece.encode("philosophy")
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.padding_side == "left"
    if roles:
        shutil.copyfile(DATA / "chatglm3" / "config.json", bpe.parent / "config.json")
        assert ChatGLMReader().read_config(bpe.parent).eos_token_id == [2, size + 6, size + 8]
        prompt = tokenizer(chat_prompt(ChatGLM3Family(), tokenizer, "你好").text, add_special_tokens=False)["input_ids"]
        assert prompt == [size + 6, *piece.encode("\n"), *piece.encode("你好"), size + 7]
    else:
        prompt = tokenizer(chat_prompt(ChatGLM2Family(), tokenizer, "你好").text, add_special_tokens=False)["input_ids"]
        assert prompt == piece.encode("[Round 1]\n\n问：你好\n\n答：")


def test_fast_tokenizer_saves_and_loads_without_the_plugin(bpe: Path, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(bpe.parent)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again).__module__.startswith("transformers.")
    assert again.padding_side == "left"
    assert again("你好 fox")["input_ids"] == tokenizer("你好 fox")["input_ids"]


def test_tiktoken_vocabulary_of_glm4(tmp_path: Path) -> None:
    tokens = [bytes([b]) for b in range(256)] + [b"fo", b"fox", b" fox", b"\n\n"]
    lines = [base64.b64encode(t) + f" {n}\n".encode() for n, t in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    tokenizer: Any = read_tokenizer(tmp_path)
    assert chat_format(tmp_path) is None
    ids = tokenizer("fox fox")["input_ids"]
    assert ids == [len(tokens) + 2, len(tokens) + 4, 257, 258]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "fox fox"
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines[:257]))  # another file at the same path
    changed: Any = read_tokenizer(tmp_path)
    assert len(changed) == len(tokenizer) - 3
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    stored = {str(len(tokens) + 1): {"content": "<|endoftext|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": stored}))
    with pytest.raises(CheckpointError, match="do not follow the 260 tokens"):
        read_tokenizer(tmp_path)
