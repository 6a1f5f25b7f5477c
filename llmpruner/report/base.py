"""ReportSection: one part of an HTML page about a model, and what it renders. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, ClassVar

from ..component import Component

if TYPE_CHECKING:
    from ..evaluation.evaluate import Line
    from ..structure.coupling import CouplingGraph

DENSE = "dense"
"""Name of the dense model on the page of a checkpoint."""


@dataclass(frozen=True)
class Costs:
    """What a model takes, by the shapes of its weights: number of parameters (tied ones once), of those in the decoder
    layers, and bytes of all weights. ``macs_per_token``: multiply-accumulate operations to decode one token while
    ``context`` tokens are in the cache. ``cache_bytes``: bytes that the key/value cache grows by with every token; None
    where that cannot be known without weights."""

    parameters: int
    decoder_parameters: int
    weight_bytes: int
    macs_per_token: int
    context: int
    cache_bytes: int | None


@dataclass(frozen=True)
class Measurements:
    """One call of ``llmpruner evaluate``. ``names``: of its models, as on the page. ``results``: what ``--json`` writes
    for each of them. ``lines``: the table of the same. ``text``: that the perplexity was measured on, as the user
    named it; None where that is not known."""

    names: tuple[str, ...]
    results: tuple[Mapping[str, Any], ...]
    lines: tuple[Line, ...]
    text: str | None = None

    def of(self, name: str) -> Mapping[str, Any]:
        """The results of one model; empty for a model that was not measured."""
        return next((one for own, one in zip(self.names, self.results, strict=True) if own == name), {})

    def text_of(self, perplexity: Mapping[str, Any]) -> str:
        """The name of the text of a perplexity, or else the start of its checksum."""
        name = perplexity.get("text") or (self.text or "").partition(",")[0]
        return name or str(perplexity.get("text_sha256", ""))[:12]


@dataclass(frozen=True)
class Evidence:
    """What is known of a checkpoint besides its record.

    ``name``: of the checkpoint on the page. ``dense``, ``costs``: of the dense model and of this one. ``measured``:
    one for each call of ``evaluate`` with this checkpoint; ``benches``: what ``bench --json`` wrote, with the names of
    the page. ``answers``: lists with ``name``, ``prompt`` and ``text`` of several models. ``runs``: ``run.json`` of the
    checkpoints that led to this one, oldest first. ``steps``: of a recipe, with ``name``, ``command`` and ``seconds``.
    """

    name: str
    dense: Costs | None = None
    costs: Costs | None = None
    measured: tuple[Measurements, ...] = ()
    benches: tuple[Mapping[str, Any], ...] = ()
    answers: tuple[tuple[Mapping[str, str], ...], ...] = ()
    runs: tuple[Mapping[str, Any], ...] = ()
    steps: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class ReportSubject:
    """The model that a page is about. ``graph``: its current coupled groups. ``record``: its ``llmpruner.json``, empty
    for a dense model. ``evidence``: for the page of ``llmpruner report``; None for that of ``discover --html``."""

    title: str
    graph: CouplingGraph
    record: Mapping[str, Any] = field(default_factory=dict)
    evidence: Evidence | None = None


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
    ``--page``, ``--box``, ``--line`` and ``--accent``. It loads nothing: images must be inline.
    """

    kind: ClassVar[str] = "report section"
    order: ClassVar[int] = 100
    """The built-in sections have 0 to 40."""

    def render(self, subject: ReportSubject) -> str | None:
        """HTML that starts with an ``<h2>``, uses no network, and has all text from the model escaped; None when there
        is nothing to show."""
        raise NotImplementedError

    def compare(self, subjects: Sequence[ReportSubject]) -> str | None:
        """HTML as of `render`, about several checkpoints together, two or more, above the sections of each one. None by
        default."""
        del subjects
        return None

    def style(self) -> str:
        """CSS for the head of the page, with selectors for this section only; empty by default."""
        return ""


def rendered(template: str, **values: Any) -> str:
    """The template of that file name, rendered with ``values``, which are escaped for HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("llmpruner.report", ".")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["bare"] = bare
    return environment.get_template(template).render(**values)


_BEFORE_PATH = re.compile(r"(?:[\d.]+\*)?(?:[\w-]{2,}:)?(?=/(?!/)|[A-Za-z]:\\)(?<!^)")
"""A share and the name of a source. One letter and a colon are a drive of Windows."""


def bare(text: str) -> str:
    """Of absolute paths, with commas between them, the last parts, as the folders mean nothing elsewhere; other text as
    it is, such as shares and sources before a path (``3*self,1*chat:/a/b.jsonl``). Known to templates as a filter."""
    return ",".join(_last(part) for part in text.split(","))


def _last(text: str) -> str:
    if named := _BEFORE_PATH.match(text):
        return named.group() + _last(text[named.end() :])
    found = next((path for path in (PurePosixPath(text), PureWindowsPath(text)) if path.is_absolute()), None)
    return text if found is None else found.name
