"""ReportSection: one part of the HTML page about pruned models; what it is given; and the page. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component
from ..errors import first_line
from ..evaluation.evaluate import Evaluations
from ..evaluation.metrics import Size
from ..structure.coupling import CouplingGraph
from ..values import bytes_text, count_text, counted, without_folders

if TYPE_CHECKING:
    from jinja2 import Environment

    from ..structure.outcome import Quality
    from ..structure.plan import PruningPlan

DENSE = "dense"
"""Name of the dense model on the page."""


@dataclass(frozen=True)
class Costs(Size):
    """The `Size` of a model by shapes. ``cache_bytes``: of the cache per token; None if unknown without weights.
    ``file_bytes``: of its files with weights; None where they are not here. ``q4_bytes``: see `q4_bytes`."""

    cache_bytes: int | None = None
    file_bytes: int | None = None
    q4_bytes: int | None = None


@dataclass(frozen=True)
class ReportSubject:
    """A checkpoint on the page. ``name``: of its folder. ``graph``: its coupled groups. ``record``: its
    ``llmpruner.json``, with ``plans`` parsed. ``dense``, ``costs``: of the dense model and of this one. ``measured``:
    one for each call of ``evaluate`` with it. ``benches``: what ``bench --json`` wrote, with the names of the page.
    ``answers``: lists with ``name``, ``prompt`` and ``text`` of several models. ``runs``: ``run.json`` of it and of the
    checkpoints that it was made from, oldest first. ``steps``: of a recipe, with ``name``, ``command``, ``seconds``."""

    title: str
    name: str
    graph: CouplingGraph
    record: Mapping[str, Any]
    plans: tuple[PruningPlan, ...]
    dense: Costs
    costs: Costs
    measured: tuple[Evaluations, ...] = ()
    benches: tuple[Mapping[str, Any], ...] = ()
    answers: tuple[tuple[Mapping[str, str], ...], ...] = ()
    runs: tuple[Mapping[str, Any], ...] = ()
    steps: tuple[Mapping[str, Any], ...] = ()

    @property
    def recovered(self) -> bool:
        """Whether it was trained after the last cut."""
        trained_last = not self.runs or self.runs[-1]["command"] == "recover"
        return bool(self.record.get("recovery")) and trained_last

    @property
    def cut_quality(self) -> Quality | None:
        """What the last `prune` measured."""
        from ..structure.outcome import Quality

        values = [work.get("quality") for work in self.record.get("work") or ()]
        return Quality(**values[-1]) if values and values[-1] else None


class ReportSection(Component):
    """Renders one section. Sections are on the page in the order of `order`, then of names.

    ::

        class Ties(ReportSection):
            name = "ties"
            summary = "parameters that share storage"

            def render(self, subject):
                rows = "".join(f"<li>{escape(a)} is {escape(b)}</li>" for a, b in subject.graph.ties.items())
                return f"<h2>Tied parameters</h2><ul>{rows}</ul>" if rows else None

    Put tables into ``<div class="scroll" tabindex="0" role="region" aria-label="…">``, so that they scroll on narrow
    screens, by keyboard too. The page defines colours for light and dark mode: the CSS variables ``--text``, ``--dim``,
    ``--page``, ``--box``, ``--line`` and ``--accent``. It loads nothing: styles and images must be inline.
    """

    kind: ClassVar[str] = "report section"
    hook: ClassVar[str] = "llmpruner_report_sections"
    order: ClassVar[int] = 100
    """The built-in sections have 0 to 40."""

    def render(self, subject: ReportSubject) -> str | None:
        """HTML that starts with ``<h2>``, uses no network, and has the model's text escaped; None for nothing to
        show."""
        raise NotImplementedError

    def compare(self, subjects: Sequence[ReportSubject]) -> str | None:
        """HTML as of `render` that compares two or more checkpoints, at the top of the page; None by default."""
        return None


def rendered(template: str, **values: Any) -> str:
    """The template of that file name, rendered with ``values``, which are escaped for HTML."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("llmpruner.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    environment.filters.update(bytes=bytes_text, count=count_text, counted=counted, without_folders=without_folders)
    return environment


@dataclass(frozen=True)
class Report:
    """A page at ``path``. ``sentences``: checkpoint → what was won and lost. ``warnings``: of sections left out."""

    path: Path
    sentences: Mapping[str, str]
    warnings: tuple[str, ...] = ()


def report_page(subjects: Sequence[ReportSubject], sections: Iterable[ReportSection]) -> tuple[str, tuple[str, ...]]:
    """The HTML document, which uses no network, and its warnings. Several checkpoints are compared at the top."""
    ordered = sorted(sections, key=lambda section: (section.order, section.name))
    warnings: dict[str, None] = {}

    def parts(render: Callable[[ReportSection], str | None]) -> list[dict[str, str]]:
        rendered_parts = []
        for section in ordered:
            # Sections of plugins may raise anything; the page is made without them.
            try:
                html = render(section)
                if html is not None and not isinstance(html, str):
                    raise TypeError(f"it returned {type(html).__name__}, expected HTML text or None")
            except Exception as error:
                warnings[f"{section.label()} is left out: {first_line(error)}"] = None
                continue
            if html is not None:
                heading = re.search(r"<h2[^>]*>(.*?)</h2>", html, re.S)
                title = unescape(re.sub(r"<[^>]*>", "", heading[1])).strip() if heading else ""
                rendered_parts.append({"id": section.name, "html": html, "title": title})
        return rendered_parts

    below = [(subject.title, parts(lambda section, of=subject: section.render(of))) for subject in subjects]  # type: ignore[misc]
    if len(subjects) == 1:
        title, top = below.pop()
    else:
        title, top = f"{len(subjects)} pruned models compared", parts(lambda section: section.compare(subjects))
    return rendered("page.html.j2", title=title, parts=top, below=below), tuple(warnings)
