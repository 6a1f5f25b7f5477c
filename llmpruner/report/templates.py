"""Rendering the Jinja templates of this package."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any


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
