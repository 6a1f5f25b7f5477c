"""Tables in README and docs are those that the benchmarks make of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import criteria, quality, sizes, support_matrix, vocabulary

ROOT = Path(__file__).parents[2]
TABLES = {
    "docs/criteria-measured.md": (
        criteria.BEGIN,
        lambda: criteria.table(json.loads(criteria.RESULTS.read_text(encoding="utf-8"))),
    ),
    "docs/how-to/vocabulary.md": (
        vocabulary.BEGIN,
        lambda: vocabulary.table(json.loads(vocabulary.RESULTS.read_text(encoding="utf-8"))),
    ),
    "docs/how-to/scale.md": (sizes.BEGIN, lambda: sizes.table(json.loads(sizes.RESULTS.read_text(encoding="utf-8")))),
}


@pytest.mark.parametrize("page", TABLES)
def test_a_page_shows_what_was_measured(page):
    begin, table = TABLES[page]
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.partition(begin)[2].partition(begin.replace("begin", "end"))[0].strip() == table().strip()


def test_written_pages_are_those_of_the_results():
    assert quality.PAGE.read_text(encoding="utf-8") == quality.page(quality.read())
    assert quality.PICTURE.read_text(encoding="utf-8") == quality.picture(quality.read())
    assert support_matrix.PAGE.read_text(encoding="utf-8") == support_matrix.render(support_matrix.read())
