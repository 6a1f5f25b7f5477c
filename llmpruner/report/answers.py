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
    ``words``: how many words are the same; None for the first model, and where both texts are equal."""

    name: str
    same: str
    parts: str = ""
    rest: str = ""
    words: int | None = None


class AnswersSection(ReportSection):
    """Nothing where no texts were generated."""

    name = "answers"
    summary = "the same prompts answered side by side, and the words where the answers part"
    order = 12

    def render(self, subject: ReportSubject) -> str | None:
        found = () if subject.evidence is None else subject.evidence.answers
        asked = [(texts[0]["prompt"], side_by_side([(one["name"], one["text"]) for one in texts])) for texts in found]
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
    shown = own[place] if place < len(own) else ""
    return Answer(name, "".join(same), shown, "".join(own[place + 1 :]), sum(word.isalnum() for word in same))
