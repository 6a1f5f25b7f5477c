"""Speed of uniformly cut models against what their sizes allow: a random LLaMA of 1B in bfloat16, whole and with 20 %
and 40 % of its decoder removed, in several runtimes.

    python -m benchmarks.speed [RUNTIME …]

Runtimes are those of ``llmpruner bench``: by default transformers, and llama-cpp where llama-cpp-python is installed.
Writes ``benchmarks/results/speed.json``, each runtime when it is done; the others keep their results. Needs an idle
machine, 12 GB of disk and 8 GB of memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .measure import as_json, machine, run, write_table

RESULTS = Path(__file__).parent / "results" / "speed.json"
PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "deploy.md"
RATIOS = (0.2, 0.4)
CASES = ("--batch", "1,4", "--prompt", "128,512", "--new", "32", "--rounds", "7")
STAGES = ("prefill", "decode")


def main() -> None:
    runtimes = sys.argv[1:] or ["transformers", *(["llama-cpp"] if find_spec("llama_cpp") else [])]
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as work:
        models = write_models(Path(work))
        for runtime in runtimes:
            paths = [gguf_of(model) for model in models] if runtime == "llama-cpp" else models
            file = Path(work) / f"{runtime}.json"
            dtype = () if runtime == "llama-cpp" else ("--dtype", "bfloat16")
            options = ("--runtime", runtime, *CASES, *dtype, "--json", str(file))
            done = run("bench", *map(str, paths), *options, timeout=7200)
            measured = json.loads(file.read_text().replace(work, "$WORK"))
            about = {"command": done["command"].replace(work, "$WORK"), "machine": machine()}
            results[runtime] = {**about, **measured}
            RESULTS.write_text(as_json(results))
    write_table(PAGE, "speed", table(results))


def write_models(folder: Path) -> list[Path]:
    """The dense model and the cut ones."""
    dense = folder / "1b"
    subprocess.run([sys.executable, "-m", "benchmarks.shapes", dense.name, str(dense)], check=True)
    cut = [folder / f"1b-{ratio:.0%}" for ratio in RATIOS]
    for ratio, path in zip(RATIOS, cut, strict=True):
        options = ("--ratio", str(ratio), "--importance", "random", "--dtype", "bfloat16")
        run("prune", str(dense), *options, "-o", str(path))
    return [dense, *cut]


def gguf_of(model: Path) -> Path:
    """The model as a GGUF file of the same dtype."""
    folder = model.with_name(model.name + "-gguf")
    run("export", str(model), "--to", "gguf", "--dtype", "bfloat16", "-o", str(folder))
    return next(folder.glob("*.gguf"))


def table(results: dict[str, Any]) -> str:
    """The speed-up, and what sizes allow in parentheses, for one sequence after the longest prompt."""
    lines = ["| runtime | decoder | prompt | decoding |", "|---|---|---|---|"]
    for runtime, measured in results.items():
        case = [case for case in measured["cases"] if case["batch"] == 1][-1]
        for ratio, model in zip(RATIOS, case["models"][1:], strict=True):
            times = (f"{model[stage]['speedup']['median']:.2f} × ({model[stage]['ideal']:.2f})" for stage in STAGES)
            lines.append(f"| {runtime} | −{ratio:.0%} | {' | '.join(times)} |")
    on = next(iter(results.values()))["machine"]
    about = f"A LLaMA of 1B in bfloat16, {case['prompt_tokens']} tokens of prompt; {on['cpu']}, {on['cores']} cores"
    used = f"torch {on['versions']['torch']}, transformers {on['versions']['transformers']}"
    return "\n".join([*lines, "", f"{about}; {used}; `python -m benchmarks.speed`."])


if __name__ == "__main__":
    main()
