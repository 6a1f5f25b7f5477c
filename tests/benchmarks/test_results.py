"""Tables in docs are those that the benchmarks make of the committed results."""

import json

import pytest

from benchmarks import criteria, quality, sizes, speed, support_matrix, vocabulary
from benchmarks.measure import marks

TABLES = {"criteria": criteria, "vocabulary": vocabulary, "sizes": sizes, "speed": speed}


@pytest.mark.parametrize("name, module", TABLES.items())
def test_a_page_shows_what_was_measured(name, module):
    begin, end = marks(name)
    table = module.table(json.loads(module.RESULTS.read_text(encoding="utf-8")))
    assert module.PAGE.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0].strip() == table


def test_written_pages_are_those_of_the_results():
    assert quality.PAGE.read_text(encoding="utf-8") == quality.page(
        quality.read(quality.RESULTS), quality.read(quality.AGAIN)
    )
    assert quality.PICTURE.read_text(encoding="utf-8") == quality.picture(quality.read(quality.RESULTS))
    assert support_matrix.PAGE.read_text(encoding="utf-8") == support_matrix.render(support_matrix.read())
