"""Chat formats: the text in which a model is asked, and the text in which it is trained on conversations.

The tokenizer's chat template is used wherever there is one, unless the family has a format of its own
(`ModelFamily.has_own_format`). A family without one has Stanford Alpaca's where the tokenizer has no template.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from ..data.conversations import Completion, Conversation, Example, Instruction
from ..errors import DataError, first_line

if TYPE_CHECKING:
    from .family import ModelFamily

_TODAY = datetime.date(2024, 7, 26)
"""The date for templates that print today's: prompts, and with them results and the identity of an interrupted
recovery, must not change at midnight."""
_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


class Prompt(NamedTuple):
    """``has_special_tokens``: the text holds its special tokens (beginning of sequence, roles) already, so it is
    tokenised with ``add_special_tokens=False``."""

    text: str
    has_special_tokens: bool


class Turn(NamedTuple):
    """A prompt and the answer to it. Text without a prompt has an empty one."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class TrainingText:
    """The text of one training example, as turns that follow one another.

    ``has_special_tokens``: the text holds its special tokens already and is tokenised with
    ``add_special_tokens=False``. Otherwise the tokenizer adds its own, and every answer gets an end-of-sequence token.
    """

    turns: tuple[Turn, ...]
    has_special_tokens: bool = False


def chat_prompt(family: ModelFamily, tokenizer: Any, instruction: str, input: str = "") -> Prompt:
    """What a model reads in order to answer ``instruction``. ``input``: what the instruction is about, if apart.

    Raises `DataError` when the tokenizer's chat template fails.
    """
    if not _uses_template(family, tokenizer):
        return Prompt(family.format_prompt(instruction, input), False)
    return Prompt(_render(tokenizer, [_question(instruction, input)], add_generation_prompt=True), True)


def training_texts(example: Example, family: ModelFamily, tokenizer: Any) -> list[TrainingText]:
    """An example in the format of its model.

    Every assistant turn of a conversation is an answer. There is one text for each example, except where a chat
    template shows earlier turns differently once others follow (Qwen3's leaves out their reasoning): then there is one
    for each answer, in the form in which the model is asked for it.

    Raises `DataError` when the tokenizer's chat template fails, such as on a system message that it has no place for.
    """
    if isinstance(example, Completion):
        return [TrainingText((Turn(example.prompt, family.format_text(example.completion)),))]
    if _uses_template(family, tokenizer):
        return _rendered(tokenizer, _messages(example))
    if isinstance(example, Instruction):
        pair = family.training_pair(example.instruction, example.output, example.input)
        return [TrainingText((Turn(*pair),))]
    pairs = family.format_conversation(example.exchanges, example.system)
    return [TrainingText(tuple(Turn(*pair) for pair in pairs))]


def common_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items (characters, tokens) both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _uses_template(family: ModelFamily, tokenizer: Any) -> bool:
    template: Any = getattr(tokenizer, "chat_template", None)
    # A dict holds templates for several purposes by name.
    return bool(template) and (isinstance(template, str) or "default" in template) and not family.has_own_format


def _question(instruction: str, input: str) -> dict[str, str]:
    return {"role": "user", "content": f"{instruction}\n{input}" if input else instruction}


def _messages(example: Instruction | Conversation) -> list[dict[str, str]]:
    if isinstance(example, Instruction):
        answer = {"role": "assistant", "content": example.output}
        return [_question(example.instruction, example.input), answer]
    return [{"role": message.role, "content": message.content} for message in example.messages]


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[TrainingText]:
    """The conversation from its start to each answer is rendered twice: up to where the model has to answer, with the
    generation prompt, and with the answer. What the second adds to the first is the answer with what closes it."""
    answers: list[tuple[str, int]] = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = _render(tokenizer, messages[:number], add_generation_prompt=True)
            answered = _render(tokenizer, messages[: number + 1])
            # The generation prompt may hold more than the template puts before an answer (the start of a reasoning).
            answers.append((answered, common_start(asked, answered)))
    whole = answers[-1][0]
    ends = [0, *(len(text) for text, _ in answers)]
    if all(whole.startswith(text) and end <= start for (text, start), end in zip(answers, ends, strict=False)):
        turns = (Turn(whole[end:start], text[start:]) for (text, start), end in zip(answers, ends, strict=False))
        return [TrainingText(tuple(turns), True)]
    return [TrainingText((Turn(text[:start], text[start:]),), True) for text, start in answers]


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
    template = _DATE.sub(lambda call: repr(_TODAY.strftime(call[2])), tokenizer.get_chat_template())
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError) as error:
        raise DataError(f"the chat template of the model's tokenizer refuses it: {first_line(error)}") from error
    return text
