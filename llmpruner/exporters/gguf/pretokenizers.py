"""How a byte-level tokenizer splits text before merging, and the name that GGUF has for it (``tokenizer.ggml.pre``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)
_SIGNS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_SIGNS}|{_SPACES}"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SIGNS_AND_SLASHES}|{_SPACES}"
_GPT4O = "|".join(
    (*(f"{words}{_CONTRACTIONS}?" for words in _CASED), r"\p{N}{1,3}", _SIGNS_AND_SLASHES, _SPACES)
)  # fmt: skip

_BYTES: Mapping[str, Any] = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False
}  # fmt: skip
_GPT2: Mapping[str, Any] = {**_BYTES, "use_regex": True}


def _split(pattern: str) -> tuple[Mapping[str, Any], ...]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, _BYTES


_STEPS: Mapping[str, tuple[tuple[Mapping[str, Any], ...], bool]] = {
    "gpt-2": ((_GPT2,), False),
    "smollm": (({"type": "Digits", "individual_digits": True}, _GPT2), False),
    "llama-bpe": (_split(_LLAMA3), True),
    "smaug-bpe": (_split(_LLAMA3), False),
    "qwen2": (_split(_QWEN2), False),
    "tekken": (_split(_TEKKEN), True),
    "gpt-4o": (_split(_GPT4O), False),
}
"""Name → steps as ``tokenizer.json`` has them, and whether a word of the vocabulary is taken without merging."""


def name_of(tokenizer: Mapping[str, Any]) -> str | None:
    """GGUF's name for how a tokenizer (the content of ``tokenizer.json``) splits text; None for one that is not known.

    Text that is normalised in another way than NFC has no name in GGUF, which does not normalise.
    """
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and normalizer != {"type": "NFC"}:
        return None
    own = _steps(tokenizer.get("pre_tokenizer"))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges", False))
    return next((n for n, (steps, ignored) in _STEPS.items() if (list(steps), ignored) == (own, ignore_merges)), None)


def steps_of(name: str) -> dict[str, Any] | None:
    """The ``pre_tokenizer`` of ``tokenizer.json`` for a name of GGUF; None for a name that is not known here."""
    if name not in _STEPS:
        return None
    return {"type": "Sequence", "pretokenizers": list(_STEPS[name][0])}


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    # Where a token begins in the text has no effect on the tokens.
    return [{**step, "trim_offsets": True} if step["type"] == "ByteLevel" else step for step in steps]
