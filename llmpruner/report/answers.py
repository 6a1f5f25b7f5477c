"""The section ``answers``: the same prompts answered by several models, and where the answers part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .base import ReportSection, ReportSubject
from .templates import rendered


@dataclass(frozen=True)
class Answer:
    """A text in three parts: ``same`` as the first model's, the word ``parts`` where they differ first, and ``rest``.
    ``equal``: how much is the same, in words; empty for the first model, and where both texts are equal."""

    name: str
    same: str
    parts: str = ""
    rest: str = ""
    equal: str = ""


class AnswersSection(ReportSection):
    """Nothing where no texts were generated."""

    name = "answers"
    summary = "the same prompts answered side by side, and the words where the answers part"
    order = 12

    def render(self, subject: ReportSubject) -> str | None:
        if subject.evidence is None:
            return None
        asked = [
            (texts[0]["prompt"], side_by_side([(one["name"], one["text"]) for one in texts]))
            for texts in subject.evidence.answers
        ]
        return rendered("answers.html.j2", asked=asked) if asked else None

    def style(self) -> str:
        return rendered("answers.css.j2")


def side_by_side(texts: Sequence[tuple[str, str]]) -> list[Answer]:
    """``texts``: (name of the model, its text); each is compared with the first."""
    (name, first), *others = texts
    return [Answer(name, first), *(_parted(other, _words(first), _words(text)) for other, text in others)]


def _words(text: str) -> list[str]:
    """Words, signs and blanks, which make up the text."""
    return re.findall(r"\s+|\w+|[^\w\s]", text)


def _parted(name: str, first: Sequence[str], own: Sequence[str]) -> Answer:
    place = next((n for n, (a, b) in enumerate(zip(first, own, strict=False)) if a != b), min(len(first), len(own)))
    if place == len(own) == len(first):
        return Answer(name, "".join(own))
    same = own[:place]
    shown, rest = _first(own[place:])
    words = sum(word.isalnum() for word in same)
    return Answer(name, "".join(same), shown, rest, f"{words} word{'' if words == 1 else 's'}")


def _first(words: Sequence[str]) -> tuple[str, str]:
    """The first word or sign, with a blank before it, which alone could not be seen; and what follows."""
    end = 2 if words and words[0].isspace() else 1
    return "".join(words[:end]), "".join(words[end:])
