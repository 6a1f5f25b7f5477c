"""Instruction data: records in the usual forms as objects of three types, independent of a model's chat format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import DataError
from .documents import EXPECTED_EXAMPLES, Record, read_records

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
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
        return Conversation((Message("user", question), Message("assistant", self.output)))


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Questions (``user``) and answers (``assistant``) in turn, at least one pair, after an optional system message."""

    messages: tuple[Message, ...]

    @property
    def system(self) -> str | None:
        return self.messages[0].content if self.messages[0].role == "system" else None

    @property
    def exchanges(self) -> list[tuple[str, str]]:
        """(question, answer) pairs, in their order."""
        turns = [message.content for message in self.messages if message.role != "system"]
        return list(zip(turns[::2], turns[1::2], strict=True))


@dataclass(frozen=True, slots=True)
class Completion:
    """Text to train on without a chat format: ``completion`` directly after ``prompt``."""

    completion: str
    prompt: str = ""


Example = Instruction | Conversation | Completion


def read_examples(source: str) -> list[tuple[str, Example]]:
    """The records of a source (see `calibration.documents`) as examples, in order, each with its place, such as
    ``a.jsonl, line 3``. Raises `DataError` with the place of the first malformed record, or when there is no record."""
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

    A system message is the first message of a conversation or in a field ``system``. An answer before the first
    question and a last question without an answer are left out. A field that is null counts as absent. Raises
    `DataError` with the place of a record of another form.
    """
    where = record.place
    if not isinstance(record.value, Mapping):
        hint = ", without fields as .json, .jsonl and .parquet files have them" if isinstance(record.value, str) else ""
        raise DataError(f"{where}: {_EXPECTED}; found {type(record.value).__name__}{hint}")
    fields = {name: value for name, value in record.value.items() if value is not None}
    if {"instruction", "output"} <= fields.keys():
        instruction, output = _filled(fields, "instruction", where), _text(fields, "output", where)
        task = Instruction(instruction, output, _text(fields, "input", where))
        if not _text(fields, "system", where).strip():
            return task
        return _conversation(task.conversation.messages, fields, where)
    for name in ("messages", "conversations"):
        if name in fields:
            return _conversation(_messages(fields[name], name, where), fields, where)
    if {"prompt", "completion"} <= fields.keys():
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _conversation(_messages(prompt + completion, "prompt' and 'completion", where), fields, where)
        return Completion(_text(fields, "completion", where), _text(fields, "prompt", where))
    if "text" in fields:
        return Completion(_filled(fields, "text", where))
    raise DataError(f"{where}: {_EXPECTED}; found {', '.join(map(repr, fields)) or 'nothing'}")


def _messages(entries: Any, field: str, where: str) -> list[Message]:
    """The messages of ``[{"role", "content"}, …]`` (OpenAI) or ``[{"from", "value"}, …]`` (ShareGPT)."""
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{where}: '{field}' must be a list of {_MESSAGE}")
    messages = []
    for number, entry in enumerate(entries, start=1):
        fields = entry if isinstance(entry, Mapping) else {}
        keys = ("role", "content") if fields.get("role") is not None else ("from", "value")
        role, content = (fields.get(key) for key in keys)
        known = _ROLES.get(role) if isinstance(role, str) else None
        if known is None or (known == "system" and number > 1) or not isinstance(content, str):
            raise DataError(
                f"{where}: message {number} must be {_MESSAGE}, or a system message as the first; its role is "
                f"{role!r}, and its content {type(content).__name__}"
            )
        messages.append(Message(known, content))
    return messages


def _conversation(messages: Sequence[Message], fields: Mapping[str, Any], where: str) -> Conversation:
    """``fields``: of the record, which may have a system message."""
    own = Message("system", _text(fields, "system", where))
    system = [message for message in (own, *messages) if message.role == "system" and message.content.strip()]
    if len(system) > 1:
        raise DataError(f"{where}: a system message is in 'system' and in the conversation; expected one of them")
    turns = [message for message in messages if message.role != "system"]
    turns = turns[1:] if turns and turns[0].role == "assistant" else turns
    turns = turns[:-1] if turns and turns[-1].role == "user" else turns
    if not turns or any(turn.role != ("user", "assistant")[number % 2] for number, turn in enumerate(turns)):
        raise DataError(f"{where}: expected questions and answers in turn, with an answer to the first question")
    return Conversation((*system, *turns))


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    """Empty for a field that is absent."""
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise DataError(f"{where}: '{name}' must be text, found {type(value).__name__}")
    return value


def _filled(fields: Mapping[str, Any], name: str, where: str) -> str:
    text = _text(fields, name, where)
    if not text.strip():
        raise DataError(f"{where}: '{name}' is empty")
    return text
