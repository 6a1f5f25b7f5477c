"""The families of Vicuna: LLaMA with a conversation format.

Vicuna has the configuration of LLaMA; it is recognised by its name or chat template, and otherwise needs ``--family``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmpruner_llama.family import LlamaFamily

from llmpruner import CheckpointError, read_json

from .conversation import V0, V1_1, Template

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Version = Literal["v0", "v1"]


class VicunaFamily(LlamaFamily):
    """Vicuna v1.1, v1.3 and v1.5."""

    name = "vicuna"
    summary = "Vicuna v1.1, v1.3 and v1.5: LLaMA with a conversation format"
    extends = "llama"
    version: ClassVar[Version] = "v1"
    template: ClassVar[Template] = V1_1

    def matches(self, config: PreTrainedConfig) -> bool:
        return super().matches(config) and version_of(config) == self.version

    def format_conversation(
        self, exchanges: Sequence[tuple[str, str]], system: str | None = None
    ) -> list[tuple[str, str]]:
        """(prompt, answer) pairs of Vicuna's training text. ``system`` replaces Vicuna's system message."""
        return (self.template if system is None else replace(self.template, system=system)).exchanges(exchanges)


class VicunaV0Family(VicunaFamily):
    """Vicuna v0, the first release: another conversation format, and one more token."""

    name = "vicuna-v0"
    summary = "Vicuna v0, the first release: another conversation format, and one more token"
    version = "v0"
    template = V0
    stop_text = V0.stop
    eos_after = "none"


_V0_NAME = re.compile(r"(^|[-_.])v0([-_.]|$)|stable[-_.]?vicuna")
"""StableVicuna is v0, tuned further with the same roles (``### Human:``, ``### Assistant:``)."""
_OTHER_FORMAT = re.compile(r"gpt[-_.]?4[-_.]?x[-_.]?vicuna")
"""GPT4-x-Vicuna is v1.1, tuned further with Alpaca's format (``### Instruction:``, ``### Response:``)."""


def version_of(config: PreTrainedConfig) -> Version | None:
    """The version of Vicuna, ``v1`` for v1.1 and later; None for other models.

    Found by the name in the reference, else the name in saved configurations, else the chat template.
    """
    place = str(getattr(config, "name_or_path", "") or "")
    folder = Path(place)
    saved: list[Any] = []
    if place and folder.is_dir():
        saved = [_read(folder / file).get("_name_or_path") for file in ("config.json", "generation_config.json")]
    for name in (_own_name(each) for each in (place, *saved) if isinstance(each, str)):
        if _OTHER_FORMAT.search(name):
            return None  # its files may name the Vicuna that it was made from
        if "vicuna" in name:
            return "v0" if _V0_NAME.search(name) else "v1"
    return _version_in_template(folder) if saved else None


def _own_name(place: str) -> str:
    """The last part of a path or hub id; for a folder in the hub's cache, the name of the repository."""
    parts = [part for part in re.split(r"[/\\]", place) if part]
    cached = [part for part in parts if part.startswith("models--")]
    return (cached or parts or [""])[-1].rpartition("--")[2].lower()


def _version_in_template(directory: Path) -> Version | None:
    template = _read(directory / "tokenizer_config.json").get("chat_template")
    file = directory / "chat_template.jinja"
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    if not isinstance(template, str):
        return None
    if V1_1.system in template and "ASSISTANT:" in template:
        return "v1"
    return "v0" if all(mark in template for mark in (V0.system, "###", "Assistant:")) else None


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if it cannot be read; loading the checkpoint will report that."""
    try:
        return read_json(path)
    except CheckpointError:
        return {}
