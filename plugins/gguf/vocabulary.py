"""The tokenizer of a model as GGUF has it: tokens with types, merges or scores, special tokens, chat template."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from llmpruner import UnsupportedModelError

RECORDED_PRE = "gguf_pre"
"""Key of ``tokenizer_config.json`` that llmpruner writes: the name in the GGUF file that a tokenizer was read from."""


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any | None, size: int, pre: str | None) -> str | None:
    """Add the vocabulary of ``size`` tokens, as many as the embedding has rows; returns the name of the pre-tokenizer,
    which is ``pre`` unless that is None. Raises `UnsupportedModelError` for a tokenizer that GGUF can't state."""
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return None
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"model": {"type": "slow"}}
        bytewise = not content["model"].get("byte_fallback")
        special = gguf.SpecialVocab(folder, load_merges=bytewise, n_vocab=size)
    if content["model"]["type"] != "BPE":
        kind = content["model"]["type"]
        raise UnsupportedModelError(f"the tokenizer is a {kind} model; GGUF needs a fast BPE one (tokenizer.json)")
    pre = _pre_tokenizer(content, tokenizer, pre) if bytewise else "default"
    writer.add_tokenizer_model("gpt2" if bytewise else "llama")
    writer.add_tokenizer_pre(pre)
    tokens, types = _tokens(tokenizer, size, bytewise=bytewise)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if not bytewise:
        writer.add_token_scores(_scores(content, size))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0] != "a")
    for name in ("bos", "eos", "unk", "sep", "pad", "mask"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None and number < size:
            special.special_token_ids[name] = number
    # What the tokenizer does, whatever its files say.
    ids = tokenizer("a")["input_ids"] or [-1]
    special.add_special_token = {"bos": ids[0] == tokenizer.bos_token_id, "eos": ids[-1] == tokenizer.eos_token_id}
    special.add_to_gguf(writer, quiet=True)
    return pre


def _pre_tokenizer(content: Mapping[str, Any], tokenizer: Any, pre: str | None) -> str:
    """GGUF's name for how a byte-level tokenizer splits text."""
    if (content.get("decoder") or {}).get("type") != "ByteLevel":
        raise UnsupportedModelError("the tokenizer is neither byte-level nor SentencePiece's BPE; GGUF has no other")
    if not content["model"].get("merges"):
        raise UnsupportedModelError("the byte-level tokenizer has no merges, and llama.cpp opens no file without them")
    name = pre or tokenizer.init_kwargs.get(RECORDED_PRE) or _known_name(content)
    if name is None:
        raise UnsupportedModelError("unknown pre-tokenizer; give llama.cpp's name for it: --set gguf.pre=NAME")
    return name


def _scores(content: Mapping[str, Any], size: int) -> list[float]:
    """The scores order the merges, as those of SentencePiece do: the earlier a merge, the higher its score."""
    vocab: Mapping[str, int] = content["model"]["vocab"]
    merges = content["model"]["merges"]
    scores = [-float(len(merges))] * (max(vocab.values()) + 1)
    for rank, pair in reversed(list(enumerate(merges))):
        scores[vocab["".join(pair)]] = -float(rank)
    unused = -10000.0
    return [*scores[:size], *[unused] * (size - len(scores))]


def _tokens(tokenizer: Any, size: int, *, bytewise: bool) -> tuple[list[str], list[int]]:
    """Texts and types of ``size`` tokens; ids that the tokenizer does not use are marked so."""
    by_id = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(size):
        text = by_id.get(number)
        if text is None:
            text, kind = f"[PAD{number}]", gguf.TokenType.UNUSED
        elif number == tokenizer.unk_token_id and not bytewise:
            kind = gguf.TokenType.UNKNOWN
        elif number in added and added[number].special:
            kind = gguf.TokenType.CONTROL
        elif number in added:
            # llama.cpp looks for these in the text as it is, with blanks.
            text, kind = text.replace("▁", " "), gguf.TokenType.USER_DEFINED
        elif not bytewise and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text):
            kind = gguf.TokenType.BYTE
        else:
            kind = gguf.TokenType.NORMAL
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


# How byte-level tokenizers split text before merging, by the name that GGUF has for it.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SIGNS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_SIGNS}|{_SPACES}"
_START = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_SIGNS_AND_SLASHES}|{_SPACES}"
_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = {**_BYTES, "use_regex": True}


def _split(pattern: str) -> list[dict[str, Any]]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, _BYTES]


_PRE_TOKENIZERS: Mapping[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_GPT2], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _GPT2], False),
    "llama-bpe": (_split(_LLAMA3), True),
    "smaug-bpe": (_split(_LLAMA3), False),
    "qwen2": (_split(_QWEN2), False),
    "tekken": (_split(_TEKKEN), True),
}
"""Name → steps as ``tokenizer.json`` has them, and whether a word of the vocabulary is taken without merging."""


def _known_name(content: Mapping[str, Any]) -> str | None:
    """None for unknown settings, and for a normalizer other than NFC, as llama.cpp does not normalise."""
    if content.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    settings = content.get("pre_tokenizer") or {"type": "Sequence", "pretokenizers": []}
    steps = settings["pretokenizers"] if settings["type"] == "Sequence" else [settings]
    # Where a token begins in the text has no effect on the tokens.
    steps = [{**step, "trim_offsets": True} if step["type"] == "ByteLevel" else step for step in steps]
    settings = steps, bool(content["model"].get("ignore_merges", False))
    return next((name for name, known in _PRE_TOKENIZERS.items() if known == settings), None)
