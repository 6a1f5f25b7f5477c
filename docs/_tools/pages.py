"""Every generated page. Tests compare them with what is committed; ``python docs/_tools`` writes them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import api_page
import cli_page
import criteria_page
import files_page
import hooks_page
import recipes_page
import structure_page

DOCS = Path(__file__).parents[1]
_NOTE = "<!-- Written by docs/_tools; do not edit. -->\n\n"


def _noted(render: Callable[[], str]) -> str:
    return _NOTE + re.sub(r"\n{3,}", "\n\n", render().strip()) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "reference/api.md": partial(_noted, api_page.render),
    "reference/cli.md": partial(_noted, cli_page.render),
    "reference/criteria.md": partial(_noted, criteria_page.render),
    "reference/files.md": partial(_noted, files_page.render),
    "reference/hooks.md": partial(_noted, hooks_page.render),
    "reference/recipes.md": partial(_noted, recipes_page.render),
    "reference/structure.md": partial(_noted, structure_page.render),
}
