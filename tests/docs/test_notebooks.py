"""The notebook is clean and runs from top to bottom on the real model; a type checker knows the script beside it."""

import ast
import json
import os
import subprocess
import sys
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


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "notebooks" / "ten_lines.py"
WRONG = """
model = llmpruner.load("demo")
model.nonsense
llmpruner.plan(model, ratoi=0.2)
llmpruner.prun(model)
plan.cutz
after[0].perplexety
"""


def mypy(folder: Path, code: str) -> str:
    """What ``mypy --strict`` prints for ``code``, as it would outside of this repository."""
    file = folder / "script.py"
    file.write_text(code, encoding="utf-8")
    (folder / "mypy.ini").write_text(
        # What is installed is not reported on; following all of torch and transformers would take minutes.
        "[mypy]\nstrict = True\n[mypy-llmpruner.*]\nfollow_imports = silent\n"
        "[mypy-transformers.*,torch.*,peft.*,datasets.*,lm_eval.*,numpy.*,safetensors.*,tokenizers.*,rich.*,typer.*,"
        "jinja2.*]\nfollow_imports = skip\nignore_missing_imports = True\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(folder / "cache"), str(file)]
    # An editable install is found by a hook of the import system, which mypy does not run.
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280).stdout


@pytest.mark.slow
def test_a_type_checker_knows_the_public_names(tmp_path):
    code = SCRIPT.read_text(encoding="utf-8")
    assert len([line for line in code.splitlines() if line and not line.startswith('"""')]) <= 10
    lines = mypy(tmp_path, code + WRONG).splitlines()
    errors = [line.partition("error: ")[2] for line in lines if ": error: " in line]
    assert len(errors) == 5, lines
    for error, what in zip(errors, ("nonsense", "ratoi", "prun", "cutz", "perplexety"), strict=True):
        assert what in error
    # All errors are those of the lines that were added.
    first = len(code.splitlines()) + 1
    assert all(int(line.split(":")[1]) >= first for line in lines if ": error: " in line)
