"""What a type checker makes of the public names: a user's script, and a mistake in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
