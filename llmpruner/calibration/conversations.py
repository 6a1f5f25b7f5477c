"""Instruction data: records in the usual forms as objects of three types, independent of a model's chat format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DataError, naming
from .documents import EXPECTED_EXAMPLES, Record, read_records

_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant",
}  # fmt: skip
_MESSAGE = "{'role': 'user' or 'assistant', 'content': text} or {'from': 'human' or 'gpt', 'value': text}"
_EXPECTED = (
    "expected 'instruction', 'output' and optionally 'input', or 'messages', or 'conversations', or 'prompt' and "
    "'completion', or 'text'"
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One task with its answer. ``input``: the text that the task refers to, where it is a separate field."""

    instruction: str
    output: str
    input: str = ""

    @property
    def conversation(self) -> Conversation:
        """One question, which ends with ``input``, and its answer."""
        question = f"{self.instruction}\n{self.input}" if self.input else self.instruction
        return Conversation(((question, self.output),))


@dataclass(frozen=True, slots=True)
class Conversation:
    """(question, answer) pairs, at least one, after an optional system message."""

    exchanges: tuple[tuple[str, str], ...]
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """Text to train on without a chat format: ``completion`` directly after ``prompt``."""

    completion: str
    prompt: str = ""


Example = Instruction | Conversation | Completion


def read_examples(source: str) -> list[tuple[str, Example]]:
    """The records of a source as examples, with places (``a.jsonl, line 3``). Raises `DataError`, also for none."""
    examples = [(record.place, example(record)) for record in read_records(source, EXPECTED_EXAMPLES)]
    if not examples:
        raise DataError(f"{source} has no examples")
    return examples


def example(record: Record) -> Example:
    """One record as an example, of the first of these forms whose fields it has; other fields are ignored.

    - ``instruction``, ``output`` and optionally ``input`` (Alpaca): an `Instruction`; a `Conversation` with ``system``;
    - ``messages``, a list of ``{"role", "content"}`` (OpenAI): a `Conversation`;
    - ``conversations``, a list of ``{"from", "value"}`` (ShareGPT) or of ``{"role", "content"}``: a `Conversation`;
    - ``prompt`` and ``completion`` (TRL): as two strings a `Completion`, as two lists of messages a `Conversation`;
    - ``text``: a `Completion` without a prompt.

    A system message is the first message or in a field ``system``. An answer before the first question and a last
    question without an answer are left out. Raises `DataError` with the place of a record of another form.
    """
    value = record.value
    with naming(record.place):
        if not isinstance(value, Mapping):
            hint = ", without fields as .json, .jsonl and .parquet files have them" if isinstance(value, str) else ""
            raise DataError(f"{_EXPECTED}; found {type(value).__name__}{hint}")
        fields = {name: field for name, field in value.items() if field is not None}
        if {"instruction", "output"} <= fields.keys():
            task = Instruction(
                _text(fields, "instruction", filled=True), _text(fields, "output"), _text(fields, "input")
            )
            system = _text(fields, "system")
            return replace(task.conversation, system=system) if system.strip() else task
        for name in ("messages", "conversations"):
            if name in fields:
                return _conversation(_messages(fields[name], name), fields)
        if {"prompt", "completion"} <= fields.keys():
            prompt, completion = fields["prompt"], fields["completion"]
            if isinstance(prompt, list) and isinstance(completion, list):
                return _conversation(_messages(prompt + completion, "prompt' and 'completion"), fields)
            return Completion(_text(fields, "completion"), _text(fields, "prompt"))
        if "text" in fields:
            return Completion(_text(fields, "text", filled=True))
        raise DataError(f"{_EXPECTED}; found {', '.join(map(repr, fields)) or 'nothing'}")


def _messages(entries: Any, field: str) -> list[tuple[str, str]]:
    """(role, content) of ``[{"role", "content"}, …]`` (OpenAI) or ``[{"from", "value"}, …]`` (ShareGPT)."""
    if not isinstance(entries, list) or not entries:
        raise DataError(f"'{field}' must be a list of {_MESSAGE}")
    messages = []
    for number, entry in enumerate(entries, start=1):
        fields = entry if isinstance(entry, Mapping) else {}
        keys = ("role", "content") if fields.get("role") is not None else ("from", "value")
        role, content = (fields.get(key) for key in keys)
        known = _ROLES.get(role) if isinstance(role, str) else None
        if known is None or (known == "system" and number > 1) or not isinstance(content, str):
            said = f"its role is {role!r}, and its content {type(content).__name__}"
            raise DataError(f"message {number} must be {_MESSAGE}, or a system message as the first; {said}")
        messages.append((known, content))
    return messages


def _conversation(messages: Sequence[tuple[str, str]], fields: Mapping[str, Any]) -> Conversation:
    """``messages``: (role, content). ``fields``: of the record, which may have a system message."""
    systems = [_text(fields, "system"), *(content for role, content in messages if role == "system")]
    systems = [content for content in systems if content.strip()]
    if len(systems) > 1:
        raise DataError("a system message is in 'system' and in the conversation; expected one of them")
    turns = [(role, content) for role, content in messages if role != "system"]
    turns = turns[1:] if turns and turns[0][0] == "assistant" else turns
    turns = turns[:-1] if turns and turns[-1][0] == "user" else turns
    questions, answers = turns[::2], turns[1::2]
    if {role for role, _ in questions} != {"user"} or {role for role, _ in answers} != {"assistant"}:
        raise DataError("expected questions and answers in turn, with an answer to the first question")
    pairs = zip(questions, answers, strict=False)
    return Conversation(tuple((question, answer) for (_, question), (_, answer) in pairs), *systems)


def _text(fields: Mapping[str, Any], name: str, *, filled: bool = False) -> str:
    """The text of a field, empty for one that is absent. ``filled``: refuse blank text."""
    text = fields.get(name, "")
    if not isinstance(text, str):
        raise DataError(f"'{name}' must be text, found {type(text).__name__}")
    if filled and not text.strip():
        raise DataError(f"'{name}' is empty")
    return text
