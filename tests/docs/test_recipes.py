"""Recipes on pages are valid, and the page on recipes lists those that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import recipes_page
import yaml

from llmpruner.recipes.recipe import COMMANDS, Recipe

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("how-to/recipes.md", "reference/recipes.md")
BLOCKS = [
    (page, number, text)
    for page in PAGES
    for number, text in enumerate(re.findall(r"^```yaml\n(.*?)^```", (DOCS / page).read_text("utf-8"), re.S | re.M))
]


@pytest.mark.parametrize(("page", "number", "text"), BLOCKS, ids=[f"{page} {number}" for page, number, _ in BLOCKS])
def test_recipes_on_pages_are_valid(page, number, text, catalog):
    assert len(Recipe.of(yaml.safe_load(text), catalog, f"docs/{page}, recipe {number + 1}").steps) > 2


def test_there_are_recipes_on_both_pages(catalog):
    assert {page for page, _, _ in BLOCKS} == set(PAGES)
    listed = re.findall(r"^\| `([\w-]+)` \| .*\|$", (DOCS / PAGES[0]).read_text("utf-8"), re.M)
    own = {name for name, _ in catalog.recipes.items() if catalog.recipes.package_of(name) == "llmpruner"}
    assert set(listed) == own and set(recipes_page.FOLDERS) == set(COMMANDS)
