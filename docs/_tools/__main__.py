"""Write the pages that are made from the source: python docs/_tools"""

from __future__ import annotations

import keywords
from pages import DOCS, PAGES

keywords.write()

for page, render in PAGES.items():
    (DOCS / page).write_text(render(), encoding="utf-8")
