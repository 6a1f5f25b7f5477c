"""Recognising Vicuna, which has the configuration of LLaMA, by its name or chat template; others need ``--family``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .conversation import V0_ZERO_SHOT, V1_1

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Version = Literal["v0", "v1"]

_V0 = re.compile(r"(^|[-_.])v0([-_.]|$)|stable[-_.]?vicuna")
"""StableVicuna is v0, tuned further with the same roles (``### Human:``, ``### Assistant:``)."""
_OTHER_FORMAT = re.compile(r"gpt[-_.]?4[-_.]?x[-_.]?vicuna")
"""GPT4-x-Vicuna is v1.1, tuned further with Alpaca's format (``### Instruction:``, ``### Response:``)."""


def version_of(config: PreTrainedConfig) -> Version | None:
    """The version of Vicuna, ``v1`` for v1.1 and later; None for other models.

    Found by the name in the reference, else the name in saved configurations, else the chat template.
    """
    place = str(getattr(config, "name_or_path", "") or "")
    if _OTHER_FORMAT.search(_own_name(place)):
        return None  # its files may name the Vicuna that it was made from
    by_name = _version_in_name(_own_name(place))
    directory = Path(place)
    if by_name is not None or not place or not directory.is_dir():
        return by_name
    for file in ("config.json", "generation_config.json"):
        saved_as = _read(directory / file).get("_name_or_path")
        if isinstance(saved_as, str):
            if _OTHER_FORMAT.search(_own_name(saved_as)):
                return None
            if version := _version_in_name(_own_name(saved_as)):
                return version
    return _version_in_template(directory)


def _own_name(place: str) -> str:
    """The last part of a path or hub id; for a folder in the hub's cache, the name of the repository."""
    parts = [part for part in re.split(r"[/\\]", place) if part]
    cached = [part for part in parts if part.startswith("models--")]
    return (cached or parts or [""])[-1].rpartition("--")[2].lower()


def _version_in_name(name: str) -> Version | None:
    if "vicuna" not in name:
        return None
    return "v0" if _V0.search(name) else "v1"


def _version_in_template(directory: Path) -> Version | None:
    template = _read(directory / "tokenizer_config.json").get("chat_template")
    file = directory / "chat_template.jinja"
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    if not isinstance(template, str):
        return None
    if V1_1.system in template and "ASSISTANT:" in template:
        return "v1"
    return "v0" if all(mark in template for mark in (V0_ZERO_SHOT.system, "###", "Assistant:")) else None


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if it cannot be read; loading the checkpoint will report that."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
