"""One self-contained HTML page made of sections."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from html import unescape
from pathlib import Path
from typing import Any

from ..errors import SettingsError, first_line
from .base import ReportSection, ReportSubject, rendered
from .summary import sentence


@dataclass(frozen=True)
class Page:
    """``html``: a complete document that uses no network. ``warnings``: one line for each section that was left out
    because it raised an exception."""

    html: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A section as it stands on the page. ``title``: its heading, as text; empty without one."""

    id: str
    html: str

    @property
    def title(self) -> str:
        found = re.search(r"<h2[^>]*>(.*?)</h2>", self.html, re.S)
        return unescape(re.sub(r"<[^>]*>", "", found[1])).strip() if found else ""


@dataclass
class _Maker:
    """Renders sections, and collects the styles and the warnings."""

    sections: Sequence[ReportSection]
    styles: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def parts(self, render: Callable[[ReportSection], str | None]) -> list[Part]:
        found = []
        for section in self.sections:
            # Sections of plugins may raise anything; the page is made without them. Settings are the user's to correct.
            try:
                part, style = render(section), section.style()
                if part is not None and not isinstance(part, str):
                    raise TypeError(f"it returned {type(part).__name__}, expected HTML text or None")
            except SettingsError:
                raise
            except Exception as error:
                self.warnings.append(f"{section.label()} is left out: {first_line(error)}")
                continue
            if part is not None:
                found.append(Part(section.name, part))
                if style and style not in self.styles:
                    self.styles.append(style)
        return found

    def page(
        self, title: str, parts: Sequence[Part], below: Sequence[tuple[str, Sequence[Part]]] = (), *, report: bool
    ) -> Page:
        everything = [*parts, *(part for _, of_one in below for part in of_one)]
        html = rendered(
            "page.html.j2",
            title=title,
            parts=parts,
            below=[{"title": name, "parts": of_one} for name, of_one in below],
            contents=report and len(parts) > 2,
            # The links stand above the first section with a heading.
            first=next((place for place, part in enumerate(parts) if part.title), 0),
            script=rendered("sort.js.j2") if any('class="sort"' in part.html for part in everything) else "",
            styles=self.styles,
        )
        return Page(html, tuple(dict.fromkeys(self.warnings)))


def report_page(subject: ReportSubject, sections: Iterable[ReportSection]) -> Page:
    """The page about ``subject``, with ``sections`` in the order that they declare.

    Raises `SettingsError` where a section cannot use a setting for this model.
    """
    maker = _Maker(_in_order(sections))
    return maker.page(subject.title, maker.parts(lambda one: one.render(subject)), report=subject.evidence is not None)


def comparison_page(subjects: Sequence[ReportSubject], sections: Iterable[ReportSection]) -> Page:
    """The page about several checkpoints: sections about all together, then those about each one, folded away.

    Raises as `report_page`.
    """
    maker = _Maker(_in_order(sections))
    parts = maker.parts(lambda one: one.compare(subjects))
    below = [(subject.title, maker.parts(lambda one, of=subject: one.render(of))) for subject in subjects]  # type: ignore[misc]
    return maker.page(f"{len(subjects)} pruned models compared", parts, below, report=True)


@dataclass(frozen=True)
class Report:
    """A page that was written to ``path``. ``facts``: JSON values for each checkpoint, with the figures that are on the
    page. ``warnings``: as of `Page`."""

    path: Path
    facts: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...] = ()

    @property
    def sentences(self) -> list[str]:
        """For each checkpoint, what was won and lost."""
        return [one["sentence"] for one in self.facts]


def facts_of(subject: ReportSubject) -> dict[str, Any]:
    """The figures of a checkpoint as JSON values. ``subject.evidence`` must not be None."""
    evidence = subject.evidence
    assert evidence is not None
    return {
        "name": evidence.name,
        "sentence": sentence(subject),
        "dense": None if evidence.dense is None else asdict(evidence.dense),
        "costs": None if evidence.costs is None else asdict(evidence.costs),
        "measured": [
            {"text": measured.text, "models": [{**measured.of(name), "name": name} for name in measured.names]}
            for measured in evidence.measured
        ],
        "benches": list(evidence.benches),
        "answers": [list(texts) for texts in evidence.answers],
        "runs": list(evidence.runs),
    }


def _in_order(sections: Iterable[ReportSection]) -> list[ReportSection]:
    return sorted(sections, key=lambda one: (one.order, one.name))
