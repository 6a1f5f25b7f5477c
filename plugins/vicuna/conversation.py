"""Vicuna's conversation formats.

Source: FastChat (https://github.com/lm-sys/FastChat, Apache-2.0), ``fastchat/conversation.py``. The published weights
were trained with exactly these texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

_SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)


@dataclass(frozen=True)
class Template:
    """A conversation as text: ``system``, ``lead``, then for every message the name of its speaker, a colon, a blank,
    the message, and the closing text of that speaker. The model writes answers from the blank to the closing text."""

    system: str
    lead: str
    names: tuple[str, str]
    """Of the human and of the assistant."""
    closing: tuple[str, str]
    stop: str | None = None
    """Text at which generation must stop, if it is not the end-of-sequence token."""

    def exchanges(self, exchanges: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Questions and answers as (prompt, answer) pairs that are joined to the text of the conversation."""
        human, assistant = self.names
        pairs = [
            (f"{human}: {question}{self.closing[0]}{assistant}:", f" {answer}{self.closing[1]}")
            for question, answer in exchanges
        ]
        return [(f"{self.system}{self.lead}{pairs[0][0]}", pairs[0][1]), *pairs[1:]]


def chat_template(template: Template) -> str:
    """``template`` as a chat template of transformers, starting with the beginning-of-sequence token. A system message
    replaces the official one."""
    human, assistant = (f"{name}:" for name in template.names)
    return (
        "{% if messages and messages[0]['role'] == 'system' %}"
        "{% set system, messages = messages[0]['content'], messages[1:] %}"
        f"{{% else %}}{{% set system = {_quoted(template.system)} %}}{{% endif %}}"
        f"{{{{ bos_token + system + {_quoted(template.lead)} }}}}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        f"{{{{ {_quoted(human + ' ')} + message['content'] + {_quoted(template.closing[0])} }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ {_quoted(assistant + ' ')} + message['content'] + {_quoted(template.closing[1])} }}}}"
        "{% else %}{{ raise_exception('only user and assistant may follow the system message') }}{% endif %}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {_quoted(assistant)} }}}}{{% endif %}}"
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


V1_1 = Template(_SYSTEM.format("user"), " ", ("USER", "ASSISTANT"), (" ", "</s>"))
"""Of the weights v1.1, v1.3 and v1.5."""
V0 = Template(_SYSTEM.format("human"), "\n### ", ("Human", "Assistant"), ("\n### ", "\n### "), stop="###")
"""Of the weights v0 (``zero_shot`` in FastChat)."""
