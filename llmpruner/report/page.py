"""One self-contained HTML page made of sections."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from ..errors import SettingsError, first_line
from .base import ReportSection, ReportSubject
from .templates import rendered


@dataclass(frozen=True)
class Page:
    """``html``: a complete document that uses no network. ``warnings``: one line for each section that was left out
    because it raised an exception."""

    html: str
    warnings: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        """For notebooks: in a frame, which keeps the page's styles out of the notebook."""
        return f'<iframe srcdoc="{escape(self.html)}" style="width: 100%; height: 40rem; border: 0"></iframe>'


def report_page(subject: ReportSubject, sections: Iterable[ReportSection]) -> Page:
    """The page about ``subject``, with ``sections`` in the order that they declare.

    Raises `SettingsError` where a section cannot use a setting for this model.
    """
    parts, styles, warnings = [], [], []
    for section in sorted(sections, key=lambda one: (one.order, one.name)):
        # Sections of plugins may raise anything; the page is made without them. Settings are the user's to correct.
        try:
            part, style = section.render(subject), section.style()
            if part is not None and not isinstance(part, str):
                raise TypeError(f"it returned {type(part).__name__}, expected HTML text or None")
        except SettingsError:
            raise
        except Exception as error:
            warnings.append(f"{section.label()} is left out: {first_line(error)}")
            continue
        if part is not None:
            parts.append(part)
            styles.append(style)
    html = rendered("page.html.j2", title=subject.title, parts=parts, styles=[style for style in styles if style])
    return Page(html, tuple(warnings))
