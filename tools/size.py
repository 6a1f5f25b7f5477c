"""Print how large the project, or another CHECKOUT of it, is: python tools/size.py [CHECKOUT]."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
PYTHON = next(filter(os.path.exists, [ROOT / ".venv/bin/python", sys.executable]))


def main() -> None:
    for folder in ("llmpruner", "plugins", "tests", "benchmarks", "tools"):
        files = [file for file in (ROOT / folder).rglob("*.py") if ".venv" not in file.parts]
        lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in files]
        nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        small = sum(node.end_lineno - node.lineno < 4 for node in functions)
        print(f"{folder}/ {sum(lines):,} lines, {len(files)} files, median {median(lines):.0f}")
        print(f"  {len(functions):,} functions, {small:,} of at most 4 lines")
    for command in ("prune", "recover", "evaluate"):
        options = set(re.findall(r"^\W*(--[a-z][a-z-]+)", run("-m", "llmpruner", command, "--help"), re.M))
        print(f"options of {command}:", len(options - {"--help"}))
    names = (ROOT / "llmpruner" / "__init__.pyi").read_text()
    print("public names:", len(re.findall(r" as \w+$", names, re.M)))
    words = sum(len(p.read_text().split()) for p in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
    print(f"words of README, CHANGELOG, CONTRIBUTING and docs: {words:,}")
    collected = re.search(r"(\d+)(/\d+)? tests", run("-m", "pytest", "--collect-only", "-m", "not long"))
    print("tests of `make test`:", collected[1] if collected else "none, as pytest fails")


def run(*words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([PYTHON, *words], cwd=ROOT, env=environment, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
