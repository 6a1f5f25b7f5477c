"""Chat formats: prompts for questions, and examples as training texts with tokens. The tokenizer's chat template is
used, unless the family has a format of its own (`ModelFamily.chat_format`); without either, Stanford Alpaca's."""

from __future__ import annotations

import datetime
import random
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateError

from ..errors import DataError, first_line, naming
from ..models.chat_format import ALPACA, ChatFormat, alpaca_prompt
from ..models.family import ModelFamily
from .base import SampleTask
from .conversations import Completion, Example, Instruction

IGNORED = -100
"""The label of tokens without a loss, as PyTorch's cross entropy and transformers have it."""

_TODAY = datetime.date(2024, 7, 26)  # for templates that print the date, so that results do not depend on the day
_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_ANSWER = "\ue000"  # is found again in what a template renders: a code point without a meaning


class Prompt(NamedTuple):
    """``has_special_tokens``: the text has them, so it is tokenised with ``add_special_tokens=False``."""

    text: str
    has_special_tokens: bool


class TrainingText(NamedTuple):
    """Prompts, maybe empty, and their answers; joined, they are one example. ``has_special_tokens``: as in `Prompt`."""

    turns: tuple[tuple[str, str], ...]
    has_special_tokens: bool = False


def chat_prompt(family: ModelFamily, tokenizer: Any, question: str, history: Sequence[tuple[str, str]] = ()) -> Prompt:
    """The prompt for ``question`` after earlier (question, answer) pairs, which a model without a chat format is not
    shown. Answers are stripped: models write the white space of their format. Raises `DataError`."""
    history = [(asked, answered.strip()) for asked, answered in history]
    if has_chat_template(family, tokenizer):
        messages = [*_messages(history), {"role": "user", "content": question}]
        return Prompt(_render(tokenizer, messages, add_generation_prompt=True), True)
    chat_format = family.chat_format
    earlier = () if chat_format is ALPACA else history
    # A format may leave out a turn without an answer; the prompt of the last turn does not depend on its answer.
    pairs = chat_format.format_conversation([*earlier, (question, "-")])
    # Closed with the last pair, as the last answer may be the only one that gets an end.
    past = _closed(pairs, chat_format.eos_after, tokenizer)[:-1]
    return Prompt("".join(asked + answered for asked, answered in past) + pairs[-1][0], False)


def training_texts(example: Example, family: ModelFamily, tokenizer: Any) -> list[TrainingText]:
    """An example in the chat format of the model: one text, or one for each answer where the format changes earlier
    turns once others follow (Qwen3 leaves out their reasoning, ChatGLM numbers rounds). Raises `DataError`."""
    chat_format = family.chat_format
    if isinstance(example, Completion):
        pair = example.prompt, chat_format.format_text(example.completion)
        return [TrainingText(_closed([pair], "every", tokenizer))]
    has_template = has_chat_template(family, tokenizer)
    if isinstance(example, Instruction):
        if not has_template and chat_format is ALPACA:
            pair = alpaca_prompt(example.instruction, example.input), example.output
            return [TrainingText(_closed([pair], ALPACA.eos_after, tokenizer))]
        example = example.conversation
    render = partial(_in_template, tokenizer) if has_template else partial(_in_format, chat_format)
    answers = [render(example.exchanges[:count], example.system) for count in range(1, len(example.exchanges) + 1)]
    whole = answers[-1][0]
    ends = [0, *(len(text) for text, _ in answers)]
    texts = [[(text[:start], text[start:])] for text, start in answers]
    if all(whole.startswith(text) and end <= start for (text, start), end in zip(answers, ends, strict=False)):
        texts = [[(whole[end:start], text[start:]) for (text, start), end in zip(answers, ends, strict=False)]]
    eos_after = "none" if has_template else chat_format.eos_after  # a template has its own
    return [TrainingText(_closed(pairs, eos_after, tokenizer), has_template) for pairs in texts]


def texts_at(place: str, example: Example, family: ModelFamily, tokenizer: Any) -> list[TrainingText]:
    """`training_texts`, with ``place`` in error messages."""
    with naming(place):
        return training_texts(example, family, tokenizer)


def has_chat_template(family: ModelFamily, tokenizer: Any) -> bool:
    """Whether prompts are in the tokenizer's chat template, and not in the format of the family."""
    template: Any = getattr(tokenizer, "chat_template", None)
    # A dict of templates by name.
    return bool(template) and (isinstance(template, str) or "default" in template) and family.chat_format is ALPACA


def has_chat_format(family: ModelFamily, tokenizer: Any | None) -> bool:
    """Whether the tokenizer has a template for chats, or the family a format."""
    return tokenizer is not None and (family.chat_format is not ALPACA or has_chat_template(family, tokenizer))


def format_note(name: str, family: ModelFamily, tokenizer: Any) -> str | None:
    """A line on the format of a prompt that is not in the tokenizer's chat template; else None."""
    if has_chat_template(family, tokenizer):
        return None
    if family.chat_format is not ALPACA:
        return f"'{name}': the prompt is in the chat format of its family, {family.name}"
    return f"'{name}' has no chat format: the prompt is in Stanford Alpaca's format for instructions"


def token_ids(text: TrainingText, tokenizer: Any) -> list[int]:
    from ..models.tokenizer import ids_to_continue

    joined = "".join(prompt + answer for prompt, answer in text.turns)
    return ids_to_continue(tokenizer, joined, special=not text.has_special_tokens)


def labelled(text: TrainingText, tokenizer: Any, cutoff: int) -> dict[str, list[int]]:
    """``input_ids`` and ``labels`` of the first ``cutoff`` tokens; tokens outside of answers have the label
    `IGNORED`."""
    from ..models.tokenizer import ids_to_continue

    ids, special, joined = token_ids(text, tokenizer), not text.has_special_tokens, ""
    answers: list[tuple[int, int]] = []
    for prompt, answer in text.turns:
        joined += prompt + answer
        answers.append((len(joined) - len(answer), len(joined)))
    if tokenizer.is_fast:
        encoded = tokenizer(joined, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        # The token before a text without a prompt, which has no characters, is trained on too.
        answered = [any(a < end and start < max(b, 1) for start, end in answers) for a, b in encoded["offset_mapping"]]
    else:

        def token_at(place: int) -> int:
            return common_start(ids_to_continue(tokenizer, joined[:place], special=special), ids) if place else 0

        spans = [(token_at(start), token_at(end)) for start, end in answers]
        answered = [any(start <= index < end for start, end in spans) for index in range(len(ids))]
    labels = [token if yes else IGNORED for token, yes in zip(ids, answered, strict=False)]
    return {"input_ids": ids[:cutoff], "labels": labels[:cutoff]}


def packed(examples: Sequence[tuple[str, Example]], task: SampleTask) -> list[list[int]]:
    """Rows of tokens: the texts of whole ``examples`` in random order, the last one cut. Unused ones are not
    tokenised."""
    rng = random.Random(task.seed)

    def texts() -> Iterator[list[int]]:
        while True:
            tokens = 0
            for number in reversed(rng.sample(range(len(examples)), len(examples))):
                for text in texts_at(*examples[number], task.family, task.tokenizer):
                    ids = token_ids(text, task.tokenizer)
                    tokens += len(ids)
                    yield ids
            if tokens < task.length:
                raise DataError(f"'{task.reference}' is too short for {task.length} tokens; lower --set prune.length")

    return filled(texts(), task.samples, task.length)


def filled(texts: Iterator[list[int]], rows: int, length: int) -> list[list[int]]:
    """Rows of ``length`` tokens; each begins with a whole text, and its last one is cut."""
    filled: list[list[int]] = []
    for _ in range(rows):
        row: list[int] = []
        while len(row) < length:
            row += next(texts)
        filled.append(row[:length])
    return filled


def _closed(pairs: Sequence[tuple[str, str]], eos_after: str, tokenizer: Any) -> tuple[tuple[str, str], ...]:
    """Prompts and answers, with an end-of-sequence token after the answers that ``eos_after`` of `ChatFormat` names."""
    eos = getattr(tokenizer, "eos_token", None) or ""
    first = {"every": 0, "last": len(pairs) - 1, "none": len(pairs)}[eos_after]
    ends = ["" if n < first or "".join(pair).endswith(eos) else eos for n, pair in enumerate(pairs)]
    return tuple((prompt, answer + end) for (prompt, answer), end in zip(pairs, ends, strict=True))


def _in_format(chat_format: ChatFormat, exchanges: Sequence[tuple[str, str]], system: str | None) -> tuple[str, int]:
    """A conversation in the format of the family, and where in the text the last answer begins."""
    *past, (prompt, answer) = chat_format.format_conversation(exchanges, system)
    before = "".join(asked + answered for asked, answered in past) + prompt
    return before + answer, len(before)


def _in_template(tokenizer: Any, exchanges: Sequence[tuple[str, str]], system: str | None) -> tuple[str, int]:
    """`_in_format`, in the tokenizer's chat template. Raises `DataError` for a template that renders no answers."""
    messages = _messages(exchanges, system)
    *before, last = messages
    asked, text = _render(tokenizer, before, add_generation_prompt=True), _render(tokenizer, messages)
    if text.startswith(asked) and last["content"].strip() in text[len(asked) :]:
        return text, len(asked)
    lead, mark, _ = _render(tokenizer, [*before, {**last, "content": _ANSWER}]).rpartition(_ANSWER)
    if not mark:
        raise DataError("the chat template of the model's tokenizer renders no answers")
    if text.startswith(asked):
        return text, len(asked)
    # What follows the question may differ: a generation prompt may begin a reasoning, which is left out.
    question = before[-1]["content"].strip()
    opened, between = (rendered.rpartition(question)[2] for rendered in (asked, lead))
    shared = common_start(opened, between)
    prompt = asked[: len(asked) - len(opened) + shared]
    return prompt + between[shared:] + text[common_start(lead, text) :], len(prompt)


def _messages(exchanges: Sequence[tuple[str, str]], system: str | None = None) -> list[dict[str, str]]:
    """A conversation as chat templates read it."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in exchanges:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
    template = _DATE.sub(lambda call: repr(_TODAY.strftime(call[2])), tokenizer.get_chat_template())
    options = {"chat_template": template, "tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        return str(tokenizer.apply_chat_template(list(messages), **options))
    except (TemplateError, TypeError) as error:
        raise DataError(f"the chat template of the model's tokenizer refuses it: {first_line(error)}") from error


def common_start(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The number of equal items (characters, tokens) at the start of both."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
