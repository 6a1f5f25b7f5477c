"""Chapter 03-criterion-and-strategy, followed to the letter. A file each, so that workers share the chapters."""

from __future__ import annotations

import pytest
from chapters import follow


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_chapter_can_be_followed(tmp_path):
    assert follow("03-criterion-and-strategy.md", tmp_path) > 4
