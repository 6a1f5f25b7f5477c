"""The tokens that a tokenizer puts before every text: BOS, as a rule, where there is one."""

from __future__ import annotations

from typing import Any

_CHARACTERS = 256
"""Of a text, which are encoded both ways."""


def opening_tokens(tokenizer: Any, text: str) -> list[int]:
    """What ``tokenizer`` puts before ``text`` when it adds its special tokens; empty where it puts nothing there.

    Found by encoding the beginning of the text both ways, as neither a name (``bos_token``) nor a flag
    (``add_bos_token``) tells: GPT-2 and Qwen have a BOS token that they never put, and ChatGLM puts two tokens.
    """
    plain, own = (
        tokenizer(text[:_CHARACTERS], add_special_tokens=special, verbose=False)["input_ids"]
        for special in (False, True)
    )
    starts = (start for start in range(len(own) - len(plain) + 1) if own[start : start + len(plain)] == plain)
    return list(own[: next(starts, 0)]) if plain else []
