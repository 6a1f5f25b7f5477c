"""ReportSection: one part of an HTML page about a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component

if TYPE_CHECKING:
    from ..structure.coupling import CouplingGraph


@dataclass(frozen=True)
class ReportSubject:
    """The model that a page is about. ``graph``: its current coupled groups. ``record``: its ``llmpruner.json``, empty
    for a dense model."""

    title: str
    graph: CouplingGraph
    record: Mapping[str, Any] = field(default_factory=dict)


class ReportSection(Component):
    """Renders one section. Sections are on the page in the order of `order`, then of names.

    ::

        class Ties(ReportSection):
            name = "ties"
            summary = "parameters that share storage"

            def render(self, subject):
                rows = "".join(f"<li>{escape(a)} is {escape(b)}</li>" for a, b in subject.graph.ties.items())
                return f"<h2>Tied parameters</h2><ul>{rows}</ul>" if rows else None

    Put tables into ``<div class="scroll">``, so that they scroll on narrow screens. The page defines colours for light
    and dark mode: the CSS variables ``--text``, ``--dim``, ``--page``, ``--box`` and ``--line``.
    """

    kind: ClassVar[str] = "report section"
    order: ClassVar[int] = 100
    """The built-in sections have 10 to 30."""

    def render(self, subject: ReportSubject) -> str | None:
        """HTML that starts with an ``<h2>``, uses no network, and has all text from the model escaped; None when there
        is nothing to show."""
        raise NotImplementedError

    def style(self) -> str:
        """CSS for the head of the page, with selectors for this section only; empty by default."""
        return ""
