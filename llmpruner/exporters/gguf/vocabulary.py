"""The tokenizer of a model as GGUF has it: tokens with types, merges or scores, special tokens, chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf

from ...errors import UnsupportedModelError
from ...models.gguf import RECORDED_PRE
from ...models.messages import quiet_transformers
from . import pretokenizers

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
_UNUSED_SCORE = -10000.0


@dataclass(frozen=True)
class Vocabulary:
    """``model``: "gpt2" (bytes, merges), "llama" (SentencePiece's BPE, scores) or "none". ``pre``: how text is split.
    ``space_prefix``: whether text begins with a blank. ``special``: ids, merges and chat template. ``stops``: texts of
    the tokens that end an answer."""

    model: str
    tokens: Sequence[str] = ()
    types: Sequence[int] = ()
    scores: Sequence[float] | None = None
    pre: str | None = None
    space_prefix: bool | None = None
    special: gguf.SpecialVocab | None = None
    stops: Sequence[str] = ()

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        if self.special is None:
            return
        writer.add_tokenizer_pre(self.pre or "default")
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.scores is not None:
            writer.add_token_scores(list(self.scores))
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        self.special.add_to_gguf(writer, quiet=True)


def vocabulary_of(tokenizer: Any | None, config: Any, size: int, folder: Path, pre: str | None = None) -> Vocabulary:
    """The vocabulary of ``size`` tokens, as many as the embedding has rows.

    ``config``: of generation, with the ids of tokens that end an answer. ``folder``: new, for the files of the
    tokenizer. ``pre``: the name of the pre-tokenizer, instead of the one found. Raises `UnsupportedModelError` for a
    tokenizer that GGUF cannot state.
    """
    if tokenizer is None:
        return Vocabulary("none")
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} has no tokenizer.json, from which GGUF's tokenizer is made; load it as a fast "
            "tokenizer of transformers and save it into the checkpoint"
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["model"]["type"] != "BPE":
        raise UnsupportedModelError(
            f"the tokenizer is a {content['model']['type']} model; GGUF files of these architectures have BPE ones"
        )
    found = _sentencepiece(content) if content["model"].get("byte_fallback") else _byte_level(content, tokenizer, pre)
    tokens, types = _tokens(tokenizer, size, is_byte_level=found.model == "gpt2")
    scores = None if found.scores is None else [*found.scores[:size], *[_UNUSED_SCORE] * (size - len(found.scores))]
    return replace(
        found, tokens=tokens, types=types, scores=scores,
        special=_special(tokenizer, folder, size, with_merges=found.model == "gpt2"), stops=_stops(tokenizer, config),
    )  # fmt: skip


def _byte_level(content: Mapping[str, Any], tokenizer: Any, pre: str | None) -> Vocabulary:
    if (content.get("decoder") or {}).get("type") != "ByteLevel":
        raise UnsupportedModelError("the tokenizer is neither byte-level nor SentencePiece's BPE; GGUF has no other")
    if not content["model"].get("merges"):
        raise UnsupportedModelError(
            "the tokenizer has no merges, and llama.cpp opens no file of a byte-level tokenizer without them; to "
            "export the weights alone, remove the tokenizer's files from a copy of the checkpoint"
        )
    name = pre or tokenizer.init_kwargs.get(RECORDED_PRE) or pretokenizers.name_of(content)
    if name is None:
        raise UnsupportedModelError(
            "the tokenizer splits text in a way that llmpruner knows no name of GGUF for; give the name that llama.cpp "
            "has for it: --set gguf.pre=NAME"
        )
    return Vocabulary("gpt2", pre=name)


def _sentencepiece(content: Mapping[str, Any]) -> Vocabulary:
    """The scores order the merges, as those of SentencePiece do: the earlier a merge, the higher its score."""
    vocab: Mapping[str, int] = content["model"]["vocab"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in content["model"]["merges"]]
    scores = [-float(len(merges))] * (max(vocab.values()) + 1)
    for rank, pair in reversed(list(enumerate(merges))):
        scores[vocab["".join(pair)]] = -float(rank)
    return Vocabulary("llama", scores=scores, space_prefix=_has_space_prefix(content))


def _has_space_prefix(content: Mapping[str, Any]) -> bool:
    normalizer, splitter = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    prepends = any(step["type"] == "Prepend" for step in normalizer.get("normalizers", [normalizer]) if step)
    steps = [step for step in splitter.get("pretokenizers", [splitter]) if step]
    scheme = next((step.get("prepend_scheme", "always") for step in steps if step["type"] == "Metaspace"), "never")
    return prepends or scheme != "never"


def _tokens(tokenizer: Any, size: int, *, is_byte_level: bool) -> tuple[list[str], list[int]]:
    """Texts and types of ``size`` tokens; ids that the tokenizer does not use are marked so."""
    by_id = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(size):
        text = by_id.get(number)
        if text is None:
            text, kind = f"[PAD{number}]", gguf.TokenType.UNUSED
        elif number == tokenizer.unk_token_id and not is_byte_level:
            kind = gguf.TokenType.UNKNOWN
        elif number in added and added[number].special:
            kind = gguf.TokenType.CONTROL
        elif number in added:
            # llama.cpp looks for these in the text as it is, with blanks.
            text, kind = text.replace("▁", " "), gguf.TokenType.USER_DEFINED
        elif not is_byte_level and _BYTE.fullmatch(text):
            kind = gguf.TokenType.BYTE
        else:
            kind = gguf.TokenType.NORMAL
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def _special(tokenizer: Any, folder: Path, size: int, *, with_merges: bool) -> gguf.SpecialVocab:
    special = gguf.SpecialVocab(folder, load_merges=with_merges, n_vocab=size)
    for name in _SPECIAL:
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None and number < size:
            special.special_token_ids[name] = number
    # What the tokenizer does, whatever its files say.
    ids = tokenizer("a")["input_ids"]
    special.add_special_token = {
        "bos": bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        "eos": bool(ids) and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
    }
    return special


def _stops(tokenizer: Any, config: Any) -> list[str]:
    stated = getattr(config, "eos_token_id", None)
    ids = [*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id]
    known = {number: text for text, number in tokenizer.get_vocab().items()}
    return [known[number] for number in dict.fromkeys(ids) if number in known]
