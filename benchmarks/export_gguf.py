"""Does llama.cpp write the same text as transformers, and what does quantising a pruned model cost?

    LLMPRUNER_DATA=… python -m benchmarks.export_gguf

Needs llama-cpp-python. The pruned demo model, with uniform and with free widths, as GGUF files of float32: ten prompts
are continued by 32 tokens, each the likeliest. Where a token differs from that of transformers, the gap between the two
likeliest is noted: sums run in different orders, so a gap of some 1e-4 may turn either way. Then perplexity on
WikiText-2, size and speed of the pruned and of the dense model in float32, q8_0 and q4_k_m. Writes
``results/export_gguf.json``. Exits with 1 where a text differs by more than such a gap.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from transformers import AutoTokenizer

import llmpruner

from .export_worker import greedy
from .measure import PROMPTS, as_json, data_folder, machine, run

RESULTS = Path(__file__).parent / "results" / "export_gguf.json"
NEW_TOKENS, NEAR_TIE = 32, 1e-3
TOKENS, WINDOW = 8192, 512
QUANTS = ("f32", "q8_0", "q4_k_m")
F32, THREADS, REPEATS = 0, 2, 3
PRUNED = {
    "uniform": ("--ratio", "0.2"),
    "free": ("--shape", "free", "--kinds", "mlp,attention", "--ratio", "0.3"),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, options in PRUNED.items():
            run("prune", "demo", *options, "--method", "fast", "-o", str(work / name))
        llmpruner.save(llmpruner.load("demo"), work / "dense")
        texts = {name: same_text(work / name) for name in PRUNED}
        quants = {f"{n} {quant}": quantised(work / n, quant) for n in ("dense", "uniform") for quant in QUANTS}
    stated = {"machine": machine() | {"llama-cpp-python": llama_cpp.__version__}}
    RESULTS.write_text(as_json({**stated, "same text": texts, "quantised": quants}), encoding="utf-8")
    print(RESULTS.read_text())
    if any(row["differ"] for row in texts.values()):
        sys.exit("llama.cpp writes another text")


def same_text(checkpoint: Path) -> dict[str, Any]:
    """``same``: prompts that are continued alike. ``near_ties``: the gap where they are not, if it is below `NEAR_TIE`;
    ``differ``: if it is above."""
    loaded = llmpruner.load(checkpoint, dtype="float32")
    runtime = opened(exported(checkpoint, "f32"))
    row: dict[str, Any] = {"prompts": len(PROMPTS), "same": 0, "near_ties": [], "differ": []}
    for text in PROMPTS:
        ids = loaded.tokenizer(text)["input_ids"]
        expected, gaps = greedy(loaded.model, ids, NEW_TOKENS)
        found = by_runtime(runtime, ids)
        at = next((n for n, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b), None)
        if at is None:
            row["same"] += 1
        else:
            row["near_ties" if gaps[at] < NEAR_TIE else "differ"].append({"token": at, "gap": gaps[at]})
    runtime.close()
    return row


def by_runtime(runtime: llama_cpp.Llama, ids: Sequence[int]) -> list[int]:
    runtime.reset()
    written, pending = [], list(ids)
    for _ in range(NEW_TOKENS):
        runtime.eval(pending)
        pending = [int(np.argmax(runtime.scores[runtime.n_tokens - 1]))]
        written += pending
    return written


def quantised(checkpoint: Path, quant: str) -> dict[str, Any]:
    """Megabytes, perplexity in windows that do not overlap, and tokens per second, the best of several."""
    file = exported(checkpoint, quant)
    text = (data_folder() / "wikitext2_unk_test.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(text[: TOKENS * 8], add_special_tokens=False)["input_ids"][:TOKENS]
    runtime, losses = opened(file), []
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        window = list(ids[start : start + WINDOW])
        runtime.reset()
        runtime.eval(window)
        logits = torch.from_numpy(runtime.scores[: WINDOW - 1].copy())
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]))))
    rates = {"prefill_per_second": 0.0, "decode_per_second": 0.0}
    for _ in range(REPEATS):
        runtime.reset()
        prefill = per_second(lambda: runtime.eval(ids[:WINDOW]), WINDOW)
        runtime.reset()
        runtime.eval(ids[:16])
        decode = per_second(lambda: [runtime.eval([token]) for token in ids[16:80]], 64)
        rates = {"prefill_per_second": max(rates["prefill_per_second"], prefill),
                 "decode_per_second": max(rates["decode_per_second"], decode)}  # fmt: skip
    runtime.close()
    row = {"megabytes": file.stat().st_size / 1e6, "perplexity": float(np.exp(np.mean(losses))), **rates}
    return {key: round(value, 2) for key, value in row.items()}


def per_second(work: Callable[[], Any], tokens: int) -> float:
    started = time.perf_counter()
    work()
    return tokens / (time.perf_counter() - started)


def exported(checkpoint: Path, quant: str) -> Path:
    """The GGUF file of a checkpoint. The command stops with an error where the file gives other logits."""
    folder = checkpoint.with_name(f"{checkpoint.name}-{quant}")
    if not folder.is_dir():
        options = ("--set", "gguf.type=f32", *(("--set", f"gguf.quant={quant}") if quant != "f32" else ()))
        run("export", str(checkpoint), "--to", "gguf", "-o", str(folder), *options)
    (file,) = folder.glob("*.gguf")
    return file


def opened(file: Path) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        str(file), n_ctx=WINDOW, n_batch=WINDOW, n_threads=THREADS, logits_all=True, type_k=F32, type_v=F32,
        verbose=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
