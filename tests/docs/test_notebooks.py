"""The notebook is clean, and runs from top to bottom on the real model; what it shows are tables."""

import ast
import json
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"
STORY = json.loads((NOTEBOOKS / "story.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in STORY["cells"] if cell["cell_type"] == "code"]


def test_no_outputs_are_committed():
    assert STORY["nbformat"] == 4
    for cell in STORY["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)


@pytest.mark.real
@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_cell_runs_and_shows_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict = {}
    for source in CODE:
        shown = _run(source, names)
        assert shown is None or isinstance(shown, str) or "<table" in shown._repr_html_(), source
    assert names["pruned"].outcome.decoder_removed == pytest.approx(0.203, abs=1e-3)  # the nearest of uniform widths
    pruned, recovered = names["after"]
    assert pruned.perplexity > names["dense"].perplexity and recovered.perplexity > 1
    assert list(names["lines"][0].get_xdata()) == sorted(names["lines"][0].get_xdata(), reverse=True)


def _run(source: str, names: dict) -> object:
    """Execute a cell; returns the value of its last expression, which a notebook shows."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)
