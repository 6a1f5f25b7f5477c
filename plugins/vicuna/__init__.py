"""Vicuna: LLaMA with a conversation format, and delta weights.

Vicuna has the configuration of LLaMA; it is recognised by its name or chat template, and otherwise needs ``--family``.

Source of the formats: FastChat (https://github.com/lm-sys/FastChat, Apache-2.0), ``fastchat/conversation.py``. The
published weights were trained with exactly these texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from llmpruner_llama import LlamaFamily

from llmpruner import ChatFormat, CheckpointError, hookimpl, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)


class VicunaFormat(ChatFormat):
    """Of the weights v1.1, v1.3 and v1.5. A conversation as text: ``system``, ``lead``, then for every message the name
    of its speaker, a colon, a blank, the message, and the closing text of that speaker. The model writes answers from
    the blank to the closing text."""

    system: ClassVar[str] = _SYSTEM.format("user")
    lead: ClassVar[str] = " "
    names: ClassVar[tuple[str, str]] = ("USER", "ASSISTANT")
    """Of the human and of the assistant."""
    closing: ClassVar[tuple[str, str]] = (" ", "</s>")

    def format_conversation(
        self, exchanges: Sequence[tuple[str, str]], system: str | None = None
    ) -> list[tuple[str, str]]:
        """(prompt, answer) pairs of Vicuna's training text. ``system`` replaces Vicuna's system message."""
        human, assistant = self.names
        pairs = [
            (f"{human}: {question}{self.closing[0]}{assistant}:", f" {answer}{self.closing[1]}")
            for question, answer in exchanges
        ]
        start = f"{self.system if system is None else system}{self.lead}"
        return [(f"{start}{pairs[0][0]}", pairs[0][1]), *pairs[1:]]


class VicunaV0Format(VicunaFormat):
    """Of the weights v0 (``zero_shot`` in FastChat)."""

    system = _SYSTEM.format("human")
    lead = "\n### "
    names = ("Human", "Assistant")
    closing = ("\n### ", "\n### ")
    eos_after = "none"
    stop_text = "###"


V1_1, V0 = VicunaFormat(), VicunaV0Format()


def chat_template(chat_format: VicunaFormat) -> str:
    """``chat_format`` as a chat template of transformers, starting with the beginning-of-sequence token. A system
    message replaces the official one."""
    human, assistant = (f"{name}:" for name in chat_format.names)
    return (
        "{% if messages and messages[0]['role'] == 'system' %}"
        "{% set system, messages = messages[0]['content'], messages[1:] %}"
        f"{{% else %}}{{% set system = {_quoted(chat_format.system)} %}}{{% endif %}}"
        f"{{{{ bos_token + system + {_quoted(chat_format.lead)} }}}}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        f"{{{{ {_quoted(human + ' ')} + message['content'] + {_quoted(chat_format.closing[0])} }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ {_quoted(assistant + ' ')} + message['content'] + {_quoted(chat_format.closing[1])} }}}}"
        "{% else %}{{ raise_exception('only user and assistant may follow the system message') }}{% endif %}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {_quoted(assistant)} }}}}{{% endif %}}"
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class VicunaFamily(LlamaFamily):  # type: ignore[misc]
    name = "vicuna"
    summary = "Vicuna v1.1, v1.3 and v1.5: LLaMA with a conversation format"
    extends = "llama"
    chat_format = V1_1

    def matches(self, config: PreTrainedConfig) -> bool:
        return super().matches(config) and format_of(config) is self.chat_format


class VicunaV0Family(VicunaFamily):
    name = "vicuna-v0"
    summary = "Vicuna v0, the first release: another conversation format, and one more token"
    chat_format = V0


_V0_NAME = re.compile(r"(^|[-_.])v0([-_.]|$)|stable[-_.]?vicuna")
"""StableVicuna is v0, tuned further with the same roles (``### Human:``, ``### Assistant:``)."""
_OTHER_FORMAT = re.compile(r"gpt[-_.]?4[-_.]?x[-_.]?vicuna")
"""GPT4-x-Vicuna is v1.1, tuned further with Alpaca's format (``### Instruction:``, ``### Response:``)."""


def format_of(config: PreTrainedConfig) -> VicunaFormat | None:
    """The conversation format of a Vicuna, by the name in the reference, else the names in saved configurations, else
    the chat template; None for other models."""
    place = str(getattr(config, "name_or_path", "") or "")
    folder = Path(place)
    saved: list[Any] = []
    if place and folder.is_dir():
        saved = [_read(folder / file).get("_name_or_path") for file in ("config.json", "generation_config.json")]
    for name in (_model_name(each) for each in (place, *saved) if isinstance(each, str)):
        if _OTHER_FORMAT.search(name):
            return None  # its files may name the Vicuna that it was made from
        if "vicuna" in name:
            return V0 if _V0_NAME.search(name) else V1_1
    if not saved:
        return None
    text = _read(folder / "tokenizer_config.json").get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        text = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for chat_format, marks in ((V1_1, ("ASSISTANT:",)), (V0, ("###", "Assistant:"))):
        if isinstance(text, str) and all(mark in text for mark in (chat_format.system, *marks)):
            return chat_format
    return None


def _model_name(place: str) -> str:
    """The last part of a path or hub id; for a folder in the hub's cache, the name of the repository."""
    parts = [part for part in re.split(r"[/\\]", place) if part]
    cached = [part for part in parts if part.startswith("models--")]
    return (cached or parts or [""])[-1].rpartition("--")[2].lower()


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if it can't be read, which loading the checkpoint will report."""
    try:
        return read_json(path)
    except CheckpointError:
        return {}


@hookimpl
def llmpruner_model_families() -> list[type]:
    return [VicunaFamily, VicunaV0Family]


@hookimpl
def llmpruner_commands(app: typer.Typer) -> None:
    app.command("apply-delta")(apply_delta)


def apply_delta(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="LLaMA, in Hugging Face's or Meta's format.")],
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="Official delta weights of Vicuna v0 or v1.1.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write; must not exist.")],
) -> None:
    """Add Vicuna's delta weights to LLaMA."""
    from . import delta as weights

    weights.apply_delta(base, delta, output)
    typer.echo(f"wrote {output}")
