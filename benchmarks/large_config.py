"""Discovery on a 70B-shaped LLaMA: only its configuration is on disk, and no weights are made.

    python -m benchmarks.large_config

Writes ``results/large_config.json``. Imports are part of the seconds.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import median

from .measure import as_json, machine, run

RESULTS = Path(__file__).parent / "results" / "large_config.json"
CONFIG = {
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
}
RUNS = 3


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "config.json").write_text(json.dumps(CONFIG))
        # The family "auto" discovers; "llama" declares its spans and would be faster still.
        runs = [run("discover", work, "--family", "auto") for _ in range(RUNS)]
    seconds = [done["seconds"] for done in runs]
    results = {
        "machine": machine(),
        "config": CONFIG,
        "seconds": {"median": median(seconds), "lowest": min(seconds), "highest": max(seconds)},
        "peak_mib": max(done["peak_mib"] for done in runs),
    }
    RESULTS.write_text(as_json(results), encoding="utf-8")
    print(as_json({"seconds": results["seconds"], "peak_mib": results["peak_mib"]}))


if __name__ == "__main__":
    main()
