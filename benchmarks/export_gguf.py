"""Does llama.cpp write the same text as transformers?

    python -m benchmarks.export_gguf

Needs llama-cpp-python. The pruned demo model, with uniform and with free widths, as GGUF files of float32: ten prompts
are continued by 32 tokens, each the likeliest. Where they differ first, the two likeliest tokens must be nearly equal,
as sums run in different orders. Writes ``results/export_gguf.json``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from .export_vllm import PRUNED, TOKENS, compared, continuations
from .measure import as_json, machine, run

RESULTS = Path(__file__).parent / "results" / "export_gguf.json"
CONTEXT, F32 = 512, 0


def main() -> None:
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in PRUNED.items():
            pruned, exported = Path(folder) / name, Path(folder) / f"{name}-gguf"
            run("prune", "demo", *options, "--method", "fast", "-o", str(pruned))
            run("export", str(pruned), "--to", "gguf", "--set", "gguf.type=f32", "-o", str(exported))
            expected = continuations(pruned)
            rows[name] = compared(expected, by_llama_cpp(exported / f"{name}.gguf", expected["prompts"]), name)
    stated = {"machine": machine() | {"llama-cpp-python": llama_cpp.__version__}}
    RESULTS.write_text(as_json({**stated, **rows}), encoding="utf-8")
    print(RESULTS.read_text())


def by_llama_cpp(file: Path, prompts: list[list[int]]) -> list[list[int]]:
    """The likeliest continuation of every prompt."""
    runtime = llama_cpp.Llama(
        str(file), n_ctx=CONTEXT, n_batch=CONTEXT, logits_all=True, type_k=F32, type_v=F32, verbose=False
    )
    written = []
    for prompt in prompts:
        runtime.reset()
        pending, tokens = prompt, list[int]()
        while len(tokens) < TOKENS:
            runtime.eval(pending)
            pending = [int(np.argmax(runtime.scores[runtime.n_tokens - 1]))]
            tokens += pending
        written.append(tokens)
    runtime.close()
    return written


if __name__ == "__main__":
    main()
