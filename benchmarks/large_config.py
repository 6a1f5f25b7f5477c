"""Discovery on the configurations of very large models: only these are on disk, and no weights are made.

    python -m benchmarks.large_config                every configuration
    python -m benchmarks.large_config hybrid-397b    this one again, the results of others stay

Writes ``results/large_config.json``. Imports are part of the seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from .measure import as_json, machine, run

RESULTS = Path(__file__).parent / "results" / "large_config.json"
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-70b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "hybrid-397b": {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "hidden_size": 4096,
        "num_hidden_layers": 60,
        "full_attention_interval": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 64,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024,
        "vocab_size": 248320,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
    },
}
"""A 70B LLaMA, and a mixture of experts with three layers of gated delta nets for each of attention, at the sizes of
Qwen3.5-397B-A17B."""
RUNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="CONFIGURATION", help=f"of {', '.join(CONFIGS)} (default: all)")
    names = parser.parse_args().names or list(CONFIGS)
    if unknown := set(names) - CONFIGS.keys():
        parser.error(f"no configuration is named {', '.join(sorted(unknown))}; there are {', '.join(CONFIGS)}")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name in names:
        results[name] = measure(CONFIGS[name])
        print(as_json({name: {k: results[name][k] for k in ("seconds", "peak_mib")}}))
    RESULTS.write_text(as_json(results), encoding="utf-8")


def measure(config: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "config.json").write_text(json.dumps(config))
        # The family "auto" discovers; one that declares its spans would be faster still.
        runs = [run("discover", work, "--family", "auto") for _ in range(RUNS)]
    seconds = [done["seconds"] for done in runs]
    return {
        "machine": machine(),
        "config": config,
        "seconds": {"median": median(seconds), "lowest": min(seconds), "highest": max(seconds)},
        "peak_mib": max(done["peak_mib"] for done in runs),
    }


if __name__ == "__main__":
    main()
