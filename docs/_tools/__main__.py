"""Write the pages that are made from the source: python docs/_tools"""

from __future__ import annotations

from pages import DOCS, PAGES

for page, render in PAGES.items():
    (DOCS / page).write_text(render(), encoding="utf-8")
