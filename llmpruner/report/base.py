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
    """What a page is about. ``graph``: the coupled groups of the model as it is. ``record``: its ``llmpruner.json``,
    empty for a dense model."""

    title: str
    graph: CouplingGraph
    record: Mapping[str, Any] = field(default_factory=dict)


class ReportSection(Component):
    """Renders one section. Sections of all plugins stand on the page by `order`, then by name.

    ::

        class Ties(ReportSection):
            name = "ties"
            summary = "parameters that share storage"

            def render(self, subject):
                rows = "".join(f"<li>{escape(a)} is {escape(b)}</li>" for a, b in subject.graph.ties.items())
                return f"<h2>Tied parameters</h2><ul>{rows}</ul>" if rows else None

    Tables belong into ``<div class="scroll">``, so that they scroll by themselves on narrow screens. The page defines
    colours for light and dark: the CSS variables ``--text``, ``--dim``, ``--page``, ``--box`` and ``--line``.
    """

    kind: ClassVar[str] = "report section"
    order: ClassVar[int] = 100
    """The built-in sections have 10 to 30."""

    def render(self, subject: ReportSubject) -> str | None:
        """HTML that starts with an ``<h2>`` and needs nothing from the network, with everything that comes from the
        model escaped; None when there is nothing to show."""
        raise NotImplementedError

    def style(self) -> str:
        """CSS for the head of the page, its selectors limited to this section. None is needed."""
        return ""
