"""Pages of the site that are files of the repository: the README as its start, the changelog, how to contribute."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
_PAGES = {source: page for page, source in COPIES.items()}


def copy(page: str) -> str:
    """The text of ``page``, with links that hold inside docs/; one to what the site does not have loses its target."""
    text = (ROOT / COPIES[page]).read_text(encoding="utf-8")
    return re.sub(r"\[([^\]\n]+)\]\(([^)\s]+)\)", _link, text)


def _link(found: re.Match[str]) -> str:
    text, target = found.groups()
    path, _, anchor = target.partition("#")
    if "://" in target or not path:
        return found[0]
    inside = path.removeprefix("docs/") if path.startswith("docs/") else _PAGES.get(path)
    return f"`{text}`" if inside is None else f"[{text}]({inside}{'#' + anchor if anchor else ''})"
