"""ChatFormat: the text in which a model is asked and trained; and Stanford Alpaca's, for models without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal


class ChatFormat:
    """The prompts and answers of a conversation as text; the format of Stanford Alpaca unless methods are overridden.

    Most formats have one method::

        class MyFormat(ChatFormat):
            def format_prompt(self, question):
                return f"User: {question}\\nBot:"
    """

    answer_separator: ClassVar[str | None] = None
    """Text between a prompt and its answer; None: a blank, unless one of them has white space there."""
    eos_after: ClassVar[Literal["every", "last", "none"]] = "every"
    """Which answers of a conversation get an end-of-sequence token, unless they have one."""
    stop_text: ClassVar[str | None] = None
    """Text before which an answer ends, besides the end-of-sequence token."""

    def format_text(self, text: str) -> str:
        """Training text outside a conversation: unchanged, unless a model needs special tokens before it."""
        return text

    def format_prompt(self, question: str) -> str:
        """The prompt for one question, which `format_conversation` uses."""
        return alpaca_prompt(question)

    def format_system(self, system: str) -> str:
        """The text of a system message, before the first prompt of a conversation."""
        return f"{system}\n\n"

    def format_conversation(
        self, exchanges: Sequence[tuple[str, str]], system: str | None = None
    ) -> Sequence[tuple[str, str]]:
        """A conversation as (prompt, answer) pairs, whose texts are joined: what is trained on, and up to the last
        prompt what ``generate --chat`` asks. ``exchanges``: (question, answer) pairs; earlier ones may get another form
        than the last. ``system``: the system message. The caller adds end-of-sequence tokens, see `eos_after`."""
        pairs = []
        for question, answer in exchanges:
            prompt = self.format_prompt(question)
            blank = " " if prompt and not prompt[-1].isspace() and not answer[:1].isspace() else ""
            pairs.append((prompt, (blank if self.answer_separator is None else self.answer_separator) + answer))
        if system is not None:
            pairs[0] = (self.format_system(system) + pairs[0][0], pairs[0][1])
        return pairs


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The instruction format of Stanford Alpaca, which the paper's recovery uses."""
    paired = ", paired with an input that provides further context" if input else ""
    context = f"### Input:\n{input}\n\n" if input else ""
    return (
        f"Below is an instruction that describes a task{paired}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{context}### Response:\n"
    )


ALPACA = ChatFormat()
"""Of families that name no format: used where the tokenizer has no chat template either."""
