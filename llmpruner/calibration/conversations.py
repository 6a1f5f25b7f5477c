"""Instruction data: records in the usual forms as objects of three types, independent of a model's chat format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeVar

from ..errors import DataError
from .documents import EXPECTED_EXAMPLES, Record, read_records

Role = Literal["system", "user", "assistant"]
Speaker = Literal["human", "gpt"]
Side = TypeVar("Side", bound=str)

_SPEAKERS: dict[str, Speaker] = {"human": "human", "user": "human", "gpt": "gpt", "chatgpt": "gpt", "assistant": "gpt"}
_ROLE_OF: dict[Speaker, Role] = {"human": "user", "gpt": "assistant"}
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_EXPECTED = (
    "expected 'instruction', 'output' and optionally 'input', or 'messages', or 'conversations', or 'prompt' and "
    "'completion', or 'text'"
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One task with its answer. ``input``: the text that the task refers to, where it is a separate field; else
    empty."""

    instruction: str
    output: str
    input: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Alternating questions (``user``) and answers (``assistant``), ending with an answer, after an optional system
    message."""

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
    """Text to train on without a chat format: ``completion`` directly after ``prompt``, which is empty for plain
    text."""

    completion: str
    prompt: str = ""


Example = Instruction | Conversation | Completion


def read_examples(source: str) -> list[Example]:
    """The records of a source (see `calibration.documents`) as examples, in order. Raises `DataError` with the
    place of the first malformed record, or when there is no record."""
    examples = [example(record) for record in read_records(source, EXPECTED_EXAMPLES)]
    if not examples:
        raise DataError(f"{source} has no examples")
    return examples


def example(record: Record) -> Example:
    """One record as an example, of the first of these forms whose fields it has; other fields are ignored.

    - ``instruction``, ``output`` and optionally ``input`` (Alpaca): an `Instruction`; with a system message, a
      `Conversation`;
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
        return _instruction(fields, where)
    if "messages" in fields:
        return _conversation(fields["messages"], "messages", where, fields)
    if "conversations" in fields:
        return _conversation(fields["conversations"], "conversations", where, fields)
    if {"prompt", "completion"} <= fields.keys():
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _conversation(prompt + completion, "prompt' and 'completion", where, fields)
        return Completion(_text(fields, "completion", where), _text(fields, "prompt", where))
    if "text" in fields:
        return Completion(_filled(fields, "text", where))
    raise DataError(f"{where}: {_EXPECTED}; found {', '.join(map(repr, fields)) or 'nothing'}")


def _instruction(fields: Mapping[str, Any], where: str) -> Instruction | Conversation:
    instruction, output = _filled(fields, "instruction", where), _text(fields, "output", where)
    subject, system = (_text({name: "", **fields}, name, where) for name in ("input", "system"))
    if not system.strip():
        return Instruction(instruction, output, subject)
    question = f"{instruction}\n{subject}" if subject else instruction
    return Conversation((Message("system", system), Message("user", question), Message("assistant", output)))


def read_sharegpt(sentences: Any, where: str) -> list[tuple[Speaker, str]]:
    """The turns of ``[{"from": "human" or "gpt", "value": text}, …]`` (ShareGPT's form), as (speaker, text).

    An answer before the first question is left out. ``where``: the place of the record, for messages. Raises
    `DataError` for another form, without an answer, or when two successive turns are of one speaker.
    """
    if not isinstance(sentences, list) or not sentences:
        raise DataError(f"{where}: 'conversations' must be a list of {{'from', 'value'}}")
    turns = [_sharegpt_turn(sentence, where) for sentence in sentences]
    return _in_turn(turns, "human", "gpt", where)


def _conversation(entries: Any, field: str, where: str, fields: Mapping[str, Any]) -> Conversation:
    system = [_text(fields, "system", where)] if "system" in fields else []
    if field == "conversations" and not _first_has(entries, "role"):
        if _first_has(entries, "from") and entries[0]["from"] == "system":
            system.append(_text(entries[0], "value", where))
            entries = entries[1:]
        turns = [(_ROLE_OF[speaker], text) for speaker, text in read_sharegpt(entries, where)]
    else:
        messages = _messages(entries, field, where)
        system += [text for role, text in messages if role == "system"]
        turns = _in_turn([turn for turn in messages if turn[0] != "system"], "user", "assistant", where)
    system = [text for text in system if text.strip()]
    if len(system) > 1:
        raise DataError(f"{where}: a system message is in 'system' and in '{field}'; expected one of them")
    answered = turns if turns[-1][0] == "assistant" else turns[:-1]
    return Conversation((*(Message("system", text) for text in system), *(Message(*turn) for turn in answered)))


def _first_has(entries: Any, key: str) -> bool:
    """Whether ``entries`` is a list whose first entry has the field ``key``, and not null."""
    first = entries[0] if isinstance(entries, list) and entries else None
    return isinstance(first, Mapping) and first.get(key) is not None


def _messages(entries: Any, field: str, where: str) -> list[tuple[Role, str]]:
    """(role, content) of every message; a system message may only be the first."""
    form = "{'role': 'user' or 'assistant', 'content': text}"
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{where}: '{field}' must be a list of {form}")
    found = []
    for number, entry in enumerate(entries, start=1):
        role, content = (entry.get("role"), entry.get("content")) if isinstance(entry, Mapping) else (None, None)
        known = _ROLES.get(role) if isinstance(role, str) else None
        if known is None or (known == "system" and number > 1) or not isinstance(content, str):
            raise DataError(
                f"{where}: message {number} must be {form}, or a system message as the first; found role {role!r} with "
                f"content of type {type(content).__name__}"
            )
        found.append((known, content))
    return found


def _sharegpt_turn(sentence: Any, where: str) -> tuple[Speaker, str]:
    value, speaker = (sentence.get("value"), sentence.get("from")) if isinstance(sentence, Mapping) else (None, None)
    if not isinstance(value, str) or not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise DataError(f"{where}: a turn is {{'from': 'human' or 'gpt', 'value': text}}, found from {speaker!r}")
    return _SPEAKERS[speaker], value


def _in_turn(turns: list[tuple[Side, str]], asks: Side, answers: Side, where: str) -> list[tuple[Side, str]]:
    """The turns from the first question on. Raises `DataError` unless turns of the roles ``asks`` and ``answers``
    alternate and there is an answer."""
    first = 2
    if turns and turns[0][0] != asks:
        turns, first = turns[1:], 3
        if turns and turns[0][0] != asks:
            raise DataError(
                f"{where}: two answers come before the first question; expected turns of '{asks}' and '{answers}'"
            )
    if all(side != answers for side, _ in turns):
        raise DataError(f"{where}: there is no answer; expected turns of '{asks}' and '{answers}'")
    for number, ((one, _), (other, _)) in enumerate(pairwise(turns), start=first):
        if one == other:
            raise DataError(
                f"{where}: turn {number} is of '{one}' again; expected turns of '{asks}' and '{answers}' in turn"
            )
    return turns


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: '{name}' must be text, found {type(value).__name__}")
    return value


def _filled(fields: Mapping[str, Any], name: str, where: str) -> str:
    text = _text(fields, name, where)
    if not text.strip():
        raise DataError(f"{where}: '{name}' is empty")
    return text
