"""Does llama.cpp write the same text as transformers, and what does quantising a pruned model cost?

    LLMPRUNER_DATA=… python -m benchmarks.export_gguf [uniform] [free] [experts] [quantised] [qwen]

Needs llama-cpp-python. ``uniform`` and ``free``: the pruned demo model as a GGUF file of float32 continues ten prompts
by 32 tokens, each the likeliest, as transformers does in float32. Where a token differs, the gap between transformers'
two likeliest tokens is noted: the sums of both run in different orders, so a gap of some 1e-4 may turn either way.
``experts``: the same of small random mixtures of experts, half of whose experts were removed. ``qwen``: the same of
Qwen2.5-Coder-0.5B-Instruct (`benchmarks.real_models`), MLP channels and heads cut. ``quantised``: perplexity on
WikiText-2, size and speed of the pruned and of the dense demo model in float32, q8_0 and q4_k_m by llama.cpp, and with
weights in int8 by torchao and transformers.
Writes ``results/export_gguf.json``; parts that did not run keep their results. Exits with 1 where a text differs by
more than such a gap.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import llmpruner

from . import real_models
from .measure import as_json, data_folder, machine, run

RESULTS = Path(__file__).parent / "results" / "export_gguf.json"
PROMPTS = (
    "The capital of France is", "Once upon a time there was a", "To bake a loaf of bread, you need",
    "In 1969, the first people", "Write a short poem about the sea.", "def fibonacci(n):",
    "The three states of water are", "My favourite animal is the", "If you add 12 and 30, you get",
    "The president said on Monday that",
)  # fmt: skip
NEW_TOKENS, NEAR_TIE = 32, 1e-2
TOKENS, WINDOW = 8192, 512
QUANTS = (None, "q8_0", "q4_k_m")
F32, THREADS, REPEATS = 0, 2, 3
QWEN = ("--ratio", "0.2", "--kinds", "mlp,attention", "--method", "fast")
EXPERTS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 8, "intermediate_size": 128}),
    "qwen3-moe": (
        Qwen3MoeForCausalLM, Qwen3MoeConfig,
        {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "head_dim": 32,
         "norm_topk_prob": True},
    ),
}  # fmt: skip
SIZES = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 4, "max_position_embeddings": 512}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parts = parser.parse_args().parts
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for part in parts:
            found[part] = PARTS[part](Path(work))
            # Another run may have added parts meanwhile.
            known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
            stated = {"machine": machine() | {"llama-cpp-python": llama_cpp.__version__}}
            RESULTS.write_text(as_json(known | stated | {part: found[part]}), encoding="utf-8")
            print(part, as_json(found[part]), flush=True)
    differing = [name for rows in found.values() for name, row in rows.items() if row.get("differ")]
    if differing:
        sys.exit(f"other text by llama.cpp: {', '.join(differing)}")


def uniform(work: Path) -> dict[str, Any]:
    return {"demo": same_text(pruned_demo(work), work)}


def free(work: Path) -> dict[str, Any]:
    options = ("--shape", "free", "--kinds", "mlp,attention", "--ratio", "0.3", "--method", "fast")
    run("prune", "demo", *options, "-o", str(work / "free"))
    return {"demo": same_text(work / "free", work)}


def qwen(work: Path) -> dict[str, Any]:
    return {"qwen": same_text(pruned_qwen(work), work)}


def pruned_qwen(work: Path) -> Path:
    run("prune", str(real_models.qwen()), *QWEN, "-o", str(work / "qwen"))
    return work / "qwen"


def pruned_demo(work: Path) -> Path:
    if not (work / "pruned").exists():
        run("prune", "demo", "--ratio", "0.2", "--method", "fast", "-o", str(work / "pruned"))
    return work / "pruned"


def experts(work: Path) -> dict[str, Any]:
    rows = {}
    for name, (model_class, config_class, sizes) in EXPERTS.items():
        torch.manual_seed(0)
        model = model_class(config_class(**SIZES, **sizes))
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in path else 0.0, 0.1)
        model.save_pretrained(work / name)
        options = (
            "--kinds",
            "expert",
            "--unit-ratio",
            "0.5",
            "--layers",
            "all",
            "--importance",
            "l2",
            "--no-tokenizer",
        )
        run("prune", str(work / name), *options, "-o", str(work / f"{name}-half"))
        rows[name] = same_text(work / f"{name}-half", work)
    return rows


def same_text(checkpoint: Path, work: Path) -> dict[str, Any]:
    """``same``: prompts that are continued alike. ``near_ties``: the gap where they are not, if it is below `NEAR_TIE`;
    ``differ``: if it is above."""
    line = export(checkpoint, work / f"{checkpoint.name}-gguf", "--set", "gguf.type=f32")
    loaded = llmpruner.load(checkpoint, dtype="float32")
    runtime = opened(file_in(work / f"{checkpoint.name}-gguf"))
    row: dict[str, Any] = {"line": line, "prompts": 0, "same": 0, "near_ties": [], "differ": []}
    for ids in prompts_of(loaded):
        expected, gaps = by_transformers(loaded.model, ids)
        found = by_runtime(runtime, ids)
        at = next((n for n, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b), None)
        row["prompts"] += 1
        if at is None:
            row["same"] += 1
        else:
            row["near_ties" if gaps[at] < NEAR_TIE else "differ"].append({"token": at, "gap": gaps[at]})
    runtime.close()
    return row


def prompts_of(loaded: llmpruner.Model) -> Iterator[list[int]]:
    """`PROMPTS` as tokens; random ones for a model without a tokenizer."""
    if loaded.tokenizer is not None:
        yield from (loaded.tokenizer(text)["input_ids"] for text in PROMPTS)
        return
    generator, vocabulary = torch.Generator().manual_seed(0), loaded.model.config.vocab_size
    yield from (torch.randint(0, vocabulary, (8,), generator=generator).tolist() for _ in PROMPTS)


def by_transformers(model: Any, ids: Sequence[int]) -> tuple[list[int], list[float]]:
    """The likeliest token `NEW_TOKENS` times, and the gap between the logits of the two likeliest each time."""
    written, gaps = list(ids), []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            best = model(torch.tensor([written]), use_cache=False).logits[0, -1].float().topk(2)
        written.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
    return written[len(ids) :], gaps


def by_runtime(runtime: llama_cpp.Llama, ids: Sequence[int]) -> list[int]:
    runtime.reset()
    written, pending = [], list(ids)
    for _ in range(NEW_TOKENS):
        runtime.eval(pending)
        pending = [int(np.argmax(runtime.scores[runtime.n_tokens - 1]))]
        written += pending
    return written


def quantised(work: Path) -> dict[str, Any]:
    dense = work / "dense"
    llmpruner.save(llmpruner.load("demo"), dense)
    text = (data_folder() / "wikitext2_unk_test.txt").read_text(encoding="utf-8")
    rows = {}
    for checkpoint in (dense, pruned_demo(work)):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        ids = tokenizer(text[: TOKENS * 8], add_special_tokens=False)["input_ids"][:TOKENS]
        for quant in QUANTS:
            options = ("--set", "gguf.type=f32", *(("--quant", quant) if quant else ()))
            folder = work / f"{checkpoint.name}-{quant or 'f32'}"
            line = export(checkpoint, folder, *options)
            file = file_in(folder)
            row = {"line": line, "megabytes": round(file.stat().st_size / 1e6, 1), "perplexity": perplexity(file, ids)}
            rows[f"{checkpoint.name} {quant or 'f32'}"] = row | speed(file, ids)
        rows[f"{checkpoint.name} int8, torchao"] = by_torchao(checkpoint, work, ids)
    return rows


def by_torchao(checkpoint: Path, work: Path, ids: Sequence[int]) -> dict[str, Any]:
    """Weights in int8, computed by transformers."""
    folder = work / f"{checkpoint.name}-int8"
    done = run("export", str(checkpoint), "--to", "torchao", "-o", str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - WINDOW + 1, WINDOW):
            window = torch.tensor([list(ids[start : start + WINDOW])])
            logits = model(window).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
            count += WINDOW - 1
        best = {"prefill_per_second": 0.0, "decode_per_second": 0.0}
        for _ in range(REPEATS):
            prompt = torch.tensor([list(ids[:WINDOW])])
            prefill = per_second(partial(model, prompt, logits_to_keep=1), WINDOW)
            cache = model(prompt[:, :16]).past_key_values

            def decode(cache: Any = cache) -> None:
                for token in ids[16:80]:
                    model(torch.tensor([[token]]), past_key_values=cache)

            best = {"prefill_per_second": max(best["prefill_per_second"], prefill),
                    "decode_per_second": max(best["decode_per_second"], per_second(decode, 64))}  # fmt: skip
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        "line": " ".join(done["output"].split()).partition(": ")[2],
        "megabytes": round(size / 1e6, 1),
        "perplexity": round(float(np.exp(total / count)), 3),
        **{name: round(value, 1) for name, value in best.items()},
    }


def perplexity(file: Path, ids: Sequence[int]) -> float:
    """In windows of `WINDOW` tokens that do not overlap, as ``evaluate --perplexity``."""
    runtime, total, count = opened(file), 0.0, 0
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        window = list(ids[start : start + WINDOW])
        runtime.reset()
        runtime.eval(window)
        logits = torch.from_numpy(runtime.scores[: WINDOW - 1].copy())
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum"))
        count += WINDOW - 1
    runtime.close()
    return round(float(np.exp(total / count)), 3)


def speed(file: Path, ids: Sequence[int]) -> dict[str, float]:
    """Tokens per second, the best of several: of reading 512 tokens, and of writing 64 after 16."""
    best = {"prefill_per_second": 0.0, "decode_per_second": 0.0}
    runtime = llama_cpp.Llama(str(file), n_ctx=WINDOW, n_batch=WINDOW, n_threads=THREADS, verbose=False)
    for _ in range(REPEATS):
        runtime.reset()
        prefill = per_second(lambda: runtime.eval(ids[:WINDOW]), WINDOW)
        runtime.reset()
        runtime.eval(ids[:16])
        decode = per_second(lambda: [runtime.eval([token]) for token in ids[16:80]], 64)
        best = {"prefill_per_second": max(best["prefill_per_second"], prefill),
                "decode_per_second": max(best["decode_per_second"], decode)}  # fmt: skip
    runtime.close()
    return {name: round(value, 1) for name, value in best.items()}


def per_second(work: Callable[[], Any], tokens: int) -> float:
    started = time.perf_counter()
    work()
    return tokens / (time.perf_counter() - started)


def export(checkpoint: Path, folder: Path, *options: str) -> str:
    """What the command prints. It stops with an error where the file gives other logits than the model."""
    done = run("export", str(checkpoint), "--to", "gguf", "-o", str(folder), *options)
    return " ".join(done["output"].split()).partition(": ")[2]


def file_in(folder: Path) -> Path:
    (file,) = folder.glob("*.gguf")
    return file


def opened(file: Path) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        str(file), n_ctx=WINDOW, n_batch=WINDOW, n_threads=THREADS, logits_all=True, type_k=F32, type_v=F32,
        verbose=False,
    )  # fmt: skip


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "uniform": uniform, "free": free, "experts": experts, "quantised": quantised, "qwen": qwen,
}  # fmt: skip

if __name__ == "__main__":
    main()
