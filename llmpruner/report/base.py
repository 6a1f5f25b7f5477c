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
    """Renders one section. Sections of all plugins stand on the page by `order`, then by name."""

    kind: ClassVar[str] = "report section"
    order: ClassVar[int] = 100

    def render(self, subject: ReportSubject) -> str | None:
        """HTML that starts with an ``<h2>`` and needs nothing from the network; None when there is nothing to show."""
        raise NotImplementedError
