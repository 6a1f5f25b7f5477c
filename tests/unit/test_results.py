"""The README's numbers are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readme_says_what_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "main_job.json").read_text())["perplexity"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("<!-- results:begin -->")[2].partition("<!-- results:end -->")[0]
    rows = dict(line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:])
    assert rows == {name: f"{value:.2f}" for name, value in measured.items()}
