"""Vicuna's conversation formats, to the character.

Source: FastChat (https://github.com/lm-sys/FastChat, Apache-2.0), ``fastchat/conversation.py`` at the
releases named below. The texts are what the published weights were trained and are prompted with: they are
the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from .examples import BIRTHDAY, RENEWABLE_ENERGY

Speaker = Literal["human", "gpt"]


class Turn(NamedTuple):
    """What one side says. ``text`` None: it is left open, for the model to write."""

    speaker: Speaker
    text: str | None


class Piece(NamedTuple):
    """A stretch of a conversation's text. ``speaker``: whose turn it belongs to, None before the first turn.
    ``answer``: the assistant has to write it, from the blank after its name to what closes the turn."""

    text: str
    speaker: Speaker | None = None
    answer: bool = False


@dataclass(frozen=True, slots=True)
class Template:
    """A conversation as text: ``system``, ``lead``, then for every turn ``before``, its name, a colon, a
    blank, the message, and what closes a turn of that side. An open or empty turn ends at its colon."""

    name: str
    system: str
    lead: str
    names: tuple[str, str]
    """Of the human and of the assistant."""
    closing: tuple[str, str]
    before: str = ""
    stop: str | None = None
    """Text at which generation has to stop, where that is not the end-of-sequence token."""
    example: tuple[Turn, ...] = ()
    """Turns that stand before every conversation; they are never trained on."""

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        shown = [piece._replace(answer=False) for turn in self.example for piece in self._turn(turn)]
        return [
            Piece(self.system + self.lead),
            *shown,
            *(piece for turn in turns for piece in self._turn(turn)),
        ]

    def _turn(self, turn: Turn) -> list[Piece]:
        side = 0 if turn.speaker == "human" else 1
        name = Piece(f"{self.before}{self.names[side]}:", turn.speaker)
        if not turn.text:
            return [name]
        return [name, Piece(f" {turn.text}{self.closing[side]}", turn.speaker, answer=side == 1)]

    def render(self, turns: Sequence[Turn]) -> str:
        return "".join(piece.text for piece in self.pieces(turns))

    def prompt(self, question: str) -> str:
        """What the model completes to answer one question."""
        return self.render([Turn("human", question), Turn("gpt", None)])

    def exchanges(self, turns: Sequence[Turn]) -> list[tuple[str, str]]:
        """The same text in (prompt, answer) pairs: answers with what closes them, prompts all between."""
        pairs: list[tuple[str, str]] = []
        prompt = ""
        for piece in self.pieces(turns):
            if piece.answer:
                pairs.append((prompt, piece.text))
                prompt = ""
            else:
                prompt += piece.text
        return pairs


_CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_V0_NAMES = ("Human", "Assistant")
_RENEWABLE = tuple(Turn(*turn) for turn in RENEWABLE_ENERGY)

V1_1 = Template("v1.1", _CURIOUS_USER, " ", ("USER", "ASSISTANT"), (" ", "</s>"))
"""Of the weights v1.1, v1.3 and v1.5."""
V0_ZERO_SHOT = Template("v0-zero-shot", _CURIOUS_HUMAN, "\n### ", _V0_NAMES, ("\n### ", "\n### "), stop="###")
V0_ONE_SHOT = replace(V0_ZERO_SHOT, name="v0-one-shot", example=tuple(Turn(*turn) for turn in BIRTHDAY))
"""What today's FastChat prompts the weights v0 with."""
V0_FIRST = Template(
    "v0-first",
    _CURIOUS_HUMAN,
    "###",
    _V0_NAMES,
    ("###", "###"),
    stop="###",
    example=(_RENEWABLE[0], Turn("gpt", f"{_RENEWABLE[1].text}\n")),
)
"""Of the first release of the v0 weights (FastChat f34f28c)."""
V0_ONE_SHOT_FIRST = Template(
    "v0-one-shot-first",
    _CURIOUS_HUMAN,
    "",
    _V0_NAMES,
    ("", ""),
    before="### ",
    stop="###",
    example=_RENEWABLE,
)
"""Of the release that brought v1.1 (FastChat 00d9e667), for the weights v0."""
V0_TRAINING = Template("v0-training", _CURIOUS_HUMAN, "\n\n", _V0_NAMES, ("\n", "\n"), before="### ", stop="###")
"""What the weights v0 were trained on (FastChat f34f28c), unlike any of its prompts."""

TEMPLATES = {t.name: t for t in (V1_1, V0_ZERO_SHOT, V0_ONE_SHOT, V0_FIRST, V0_ONE_SHOT_FIRST, V0_TRAINING)}
