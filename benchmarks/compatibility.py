"""The lowest and the newest supported versions of what llmpruner stands on, each with a selection of the tests.

    python benchmarks/compatibility.py                   every combination; slow, and downloads several copies of torch
    python benchmarks/compatibility.py lowest            this one
    python benchmarks/compatibility.py lowest --keep DIR keep (and use again) its environment below DIR

Exits with 1 when something cannot be installed or a test fails.

Lowest means: exactly the lower bounds that pyproject.toml states; other packages are as new as pip finds them. A bound
that pip cannot satisfy, or with which tests fail, is wrong and must be raised.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from install_check import copy_of_the_tree

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compatibility.json"
COMBINATIONS = {
    "newest": (),
    "lowest transformers": ("transformers",),
    "lowest torch": ("torch",),
    "lowest peft and lm-eval": ("peft", "lm-eval"),
    "lowest": ("torch", "transformers", "peft", "lm-eval", "accelerate"),
}
"""Name → the packages that are held at their lower bound; pip takes the newest of all others."""
TESTS = (
    "tests/unit/test_surgery.py",
    "tests/unit/test_checkpoint_roundtrip.py",
    "tests/unit/test_recovery_training.py",
    "tests/unit/test_evaluation_tasks.py",
    "tests/discovery/test_propagation.py",
    "tests/plugins/test_llama_family.py",
)
"""Everything that touches what these packages change most: caches, attention, LoRA, the harness, the exporter."""
SHOWN = ("torch", "transformers", "peft", "lm-eval", "accelerate", "datasets", "tokenizers", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(COMBINATIONS)}; all by default")
    parser.add_argument("--keep", type=Path, help="folder for the environments, which are used again when they exist")
    options = parser.parse_args()
    unknown = set(options.names) - set(COMBINATIONS)
    if unknown:
        parser.error(f"no combination is called {sorted(unknown)[0]}")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    bounds = lower_bounds((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    names = options.names or list(COMBINATIONS)
    with tempfile.TemporaryDirectory() as folder:
        source = copy_of_the_tree(Path(folder) / "source")
        for name in names:
            pins = [f"{package}=={bounds[package]}" for package in COMBINATIONS[name]]
            environment = (options.keep or Path(folder)).resolve() / name.replace(" ", "-")
            print(f"{name}: {', '.join(pins) or 'no pins'}", flush=True)
            results[name] = {"pins": pins, **examine(environment, pins, source)}
            why = results[name].get("failed") or results[name].get("reason", [])
            print("\n".join(f"  {line}" for line in (results[name]["result"], *why)), flush=True)
            RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    wrong = [name for name in names if not results[name]["passed"]]
    if wrong:
        sys.exit(f"not right: {', '.join(wrong)}; see {RESULTS.relative_to(ROOT)}")


def lower_bounds(project: str) -> dict[str, str]:
    """Package → the version after ``>=`` in a requirement of pyproject.toml."""
    return dict(re.findall(r'"([a-z0-9-]+)(?:\[\w+\])?>=([\d.]+)"', project))


def examine(environment: Path, pins: list[str], source: Path) -> dict[str, Any]:
    """Install and test; what stops it is the result."""
    python = environment / "bin" / "python"
    started = time.monotonic()
    if not environment.exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    command = [python, "-m", "pip", "install", "--quiet", f"{source}[all]", "pytest>=8", "pytest-timeout", *pins]
    done = run(command, source, timeout=3600)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if "ERROR" in line or "conflict" in line]
        return {"passed": False, "result": "cannot be installed", "reason": reason[:3]}
    installed = round(time.monotonic() - started)
    done = run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS], source, timeout=3600)
    said = done.stdout.splitlines()
    return {
        "passed": done.returncode == 0,
        "result": said[-1] if said else done.stderr.splitlines()[-1],
        "failed": [line.partition(" ")[2][:200] for line in said if line.startswith(("FAILED", "ERROR"))],
        "versions": versions(python, source),
        "install_seconds": installed,
        "test_seconds": round(time.monotonic() - started) - installed,
    }


def run(command: list[object], folder: Path, timeout: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def versions(python: Path, folder: Path) -> dict[str, str]:
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {SHOWN}}}))"
    found: dict[str, str] = json.loads(run([python, "-c", code], folder, timeout=60).stdout)
    return {"python": platform.python_version(), **found}


if __name__ == "__main__":
    main()
