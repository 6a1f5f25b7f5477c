"""The numbers in README and docs are those of the committed results."""

from __future__ import annotations

from pathlib import Path

from benchmarks import quality

ROOT = Path(__file__).parents[2]


def test_the_readme_has_the_committed_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition(quality.BEGIN)[2].partition(quality.END)[0]
    assert table.strip() == quality.overview(quality.read_results()).strip()


def test_the_page_of_quality_has_the_committed_results():
    assert (ROOT / "docs" / "quality.md").read_text(encoding="utf-8") == quality.page(quality.read_results())


def test_the_default_method_beats_the_papers_wherever_both_were_measured():
    done = quality.read_results()
    pairs = [
        (entry["perplexity"], other["perplexity"])
        for entry in done.values()
        if entry["row"]["method"] == "best"
        and (other := done.get(quality.Row(**entry["row"] | {"method": "llm-pruner"}).key))
    ]
    assert pairs and all(best < paper for best, paper in pairs)
