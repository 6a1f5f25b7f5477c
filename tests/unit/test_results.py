"""Tables in README and docs are those that the benchmarks make of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import chatglm_drill, criteria, quality_page, quality_rows

ROOT = Path(__file__).parents[2]
TABLES = {
    "README.md": lambda: quality_page.overview(quality_rows.read_results()),
    "docs/index.md": lambda: quality_page.overview(quality_rows.read_results()),
    "docs/criteria-measured.md": lambda: criteria.table(json.loads(criteria.RESULTS.read_text(encoding="utf-8"))),
    "docs/models.md": lambda: chatglm_drill.table(json.loads(chatglm_drill.RESULTS.read_text(encoding="utf-8"))),
}


@pytest.mark.parametrize("page", TABLES)
def test_a_page_shows_what_was_measured(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    begin, end = (
        (chatglm_drill.BEGIN, chatglm_drill.END) if page == "docs/models.md" else (quality_page.BEGIN, quality_page.END)
    )
    assert text.partition(begin)[2].partition(end)[0].strip() == TABLES[page]().strip()


def test_the_page_of_quality_is_written_by_its_benchmark():
    assert (ROOT / "docs" / "quality.md").read_text(encoding="utf-8") == quality_page.page(quality_rows.read_results())
