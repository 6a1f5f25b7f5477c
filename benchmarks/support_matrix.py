"""Discovery and the oracle on every causal language model type that the installed transformers knows.

    python -m benchmarks.support_matrix              all types that have no result yet, two at a time
    python -m benchmarks.support_matrix llama gpt2   these types again
    python -m benchmarks.support_matrix --render     write docs/support-matrix.md again, run nothing

A small random instance of each type's default configuration is checked in a process of its own, with a limit of time.
Results are JSON lines; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "support_matrix.jsonl"
PAGE = ROOT / "docs" / "support-matrix.md"
TIME_LIMIT = 480
KINDS = ("mlp", "attention", "query", "expert", "latent", "hidden", "layer")
PARTS = {
    "mlp": re.compile(r"mlp|feed_?forward|ffn|ffw|\bfc\d|experts|h_to_4h|intermediate|\.ff\b|channel_mix|\bw1\b", re.I),
    "attention": re.compile(r"attn|attention", re.I),
}
"""Parts that a type is said to have, whether or not discovery finds them: by the paths and classes of its modules."""
_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip
INCOMPLETE: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 500000.0, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "lfm2_moe": {
        "num_hidden_layers": 24,
        "layer_types": ["full_attention" if n in (2, 6, 10, 14, 18, 21) else "conv" for n in range(24)],
    },
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
}
"""What the default configuration of a type leaves open, without which no model can be built from it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types to run again; by default those without a result")
    parser.add_argument("--render", action="store_true", help="write the page from the results and stop")
    options = parser.parse_args()
    if not options.render:
        run(options.types or [name for name in all_types() if name not in read()])
    PAGE.write_text(render(read()), encoding="utf-8")


def all_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def run(types: Iterable[str]) -> None:
    """Examine each type in a process of its own and append its result."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}

    def examined(name: str) -> dict[str, Any]:
        failed = {"type": name, "transformers": version("transformers")}
        code = f"import json; from benchmarks.support_matrix import examine; print(json.dumps(examine({name!r})))"
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIME_LIMIT, env=environment,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {**failed, "reason": f"not finished within {TIME_LIMIT} s"}
        if done.returncode:
            return {**failed, "reason": f"the process ended with status {done.returncode}"}
        return {"type": name, **json.loads(done.stdout.splitlines()[-1])}

    with ThreadPoolExecutor(2) as pool, RESULTS.open("a", encoding="utf-8") as file:
        for result in pool.map(examined, types):
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(result["type"], {v["kind"]: v["verdict"] for v in result.get("verdicts", [])} or result.get("reason"))


def examine(model_type: str) -> dict[str, Any]:
    """Build, run, discover and verify the default configuration; what stops it is the result."""
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    from llmpruner.discovery.tiny import random_instance
    from llmpruner.discovery.verify import check_kinds, representative
    from llmpruner.errors import UnsupportedModelError, first_line
    from llmpruner.models.family import AutoFamily

    logging.set_verbosity_error()
    result: dict[str, Any] = {"transformers": version("transformers")}
    started = time.monotonic()
    try:
        small, graph = representative(CONFIG_MAPPING[model_type](**INCOMPLETE.get(model_type, {})), AutoFamily())
        model = random_instance(small)
        result["has"] = [kind for kind, pattern in PARTS.items() if has_part(model, pattern)]
        verdicts = check_kinds(AutoFamily(), small, graph, kinds=KINDS)
    except UnsupportedModelError as error:
        result["reason"] = str(error)
    except Exception as error:
        result["reason"] = f"the class cannot be used: {first_line(error)} ({type(error).__name__})"
    else:
        result["verdicts"] = [
            {"kind": v.kind, "verdict": v.verdict, "reason": re.sub(r"/\S+/", "", v.reason),
             "difference": v.difference}
            for v in verdicts
        ]  # fmt: skip
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def has_part(model: Any, pattern: re.Pattern[str]) -> bool:
    """Norms are left out: they are called after what comes before or after them, also where it is of another kind."""
    names = (f"{path} {type(module).__name__}" for path, module in model.named_modules())
    return any(pattern.search(name) for name in names if "norm" not in name.rpartition(".")[2].lower())


def read() -> dict[str, dict[str, Any]]:
    """The latest result of every type."""
    return {r["type"]: r for r in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())}


def render(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page: a summary, the types by what is verified, and why the others are not."""
    runnable = {name: r for name, r in sorted(results.items()) if "has" in r}
    verified = {
        name: tuple(k for k in KINDS if any(v["kind"] == k and v["verdict"] == "verified" for v in r["verdicts"]))
        for name, r in runnable.items()
        if "verdicts" in r
    }
    versions = sorted({r["transformers"] for r in results.values()})
    lines = [
        "# Support matrix",
        "",
        "<!-- Written by benchmarks/support_matrix.py; do not edit. -->",
        "",
        f"All {len(results)} causal language model types of transformers {' and '.join(versions)}: structure "
        "discovered by tracing, then verified on a small random instance: random uneven cuts must equal the silenced "
        f"model, also with a cache and after saving and loading. {len(results) - len(runnable)} types cannot be built "
        "or run on a CPU. Tokens (`vocabulary`) are not in the table; tests verify them for a dozen of these types. "
        "Check your own model with `llmpruner discover MODEL --verify`.",
        "",
        "| kind | verified | types that have it |",
        "|---|---|---|",
    ]
    for kind in KINDS:
        found = [r for r in runnable.values() if kind in r["has"] or kind in (v["kind"] for v in r.get("verdicts", []))]
        lines.append(f"| {kind} | {sum(kind in kinds for kinds in verified.values())} | {len(found)} |")
    lines += ["", "## What is verified, by type", ""]
    for kinds, _ in Counter(verified.values()).most_common():
        names = ", ".join(name for name, own in verified.items() if own == kinds)
        lines += [f"**{', '.join(kinds) or 'nothing'}**: {names}", ""]
    lines += ["## Why not", "", "| type | kind | reason |", "|---|---|---|"]
    for name, result in results.items():
        wrong = [(v["kind"], v["reason"]) for v in result.get("verdicts", []) if v["verdict"] != "verified"]
        if "verdicts" not in result:
            wrong = [("all", result.get("reason", ""))]
        lines += [f"| {name} | {kind} | {plain(reason)} |" for kind, reason in wrong]
    return "\n".join([*lines, ""])


def plain(text: str) -> str:
    """On one line, without addresses, paths and bars, at most 160 characters."""
    return re.sub(r"\s+", " ", re.sub(r"0x[0-9a-f]+|/\S+/", "", text)).replace("|", "\\|").strip()[:160]


if __name__ == "__main__":
    main()
