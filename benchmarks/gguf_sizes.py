"""Bytes of GGUF files of type q4_k_m, of models with and without a fifth of their decoder: types, bits per weight.

    LLMPRUNER_MODELS=… python -m benchmarks.gguf_sizes [MODEL …]

Needs llama-cpp-python. Prunes by ``--method fast``: sizes do not depend on which channels go. Writes
``results/gguf_sizes.json`` and the table in ``docs/how-to/deploy.md``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import gguf

from . import real_models
from .measure import as_json, machine, run, write_table

RESULTS = Path(__file__).parent / "results" / "gguf_sizes.json"
PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "deploy.md"
MODELS = {"Qwen2.5-Coder-0.5B": "qwen-0.5b", "Qwen2.5-Coder-1.5B": "qwen-1.5b"}
QUANT = ("--to", "gguf", "--set", "gguf.quant=q4_k_m")


def main() -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in sys.argv[1:] or MODELS:
        dense = str(real_models.gguf(MODELS[name]))
        with tempfile.TemporaryDirectory() as work:
            done = run("prune", dense, "--ratio", "0.2", "--method", "fast", "--json", "-o", f"{work}/pruned")
            outcome = json.loads(done["output"])["result"]
            rows = {"its own file": facts(Path(dense))}
            for row, model in (("dense", dense), ("pruned", f"{work}/pruned")):
                run("export", model, *QUANT, "-o", f"{work}/{row}-q4")
                (file,) = Path(work, f"{row}-q4").glob("*.gguf")
                rows[row] = facts(file)
        results[name] = {"machine": machine(), "removed": outcome["decoder_removed"], "rows": rows}
        RESULTS.write_text(as_json(results))
    write_table(PAGE, "gguf-sizes", table(results))


def facts(file: Path) -> dict[str, Any]:
    tensors = gguf.GGUFReader(file).tensors
    weights = sum(int(tensor.n_elements) for tensor in tensors)
    types = Counter(tensor.tensor_type.name.lower() for tensor in tensors)
    stored = sum(int(tensor.n_bytes) for tensor in tensors)
    return {"bytes": file.stat().st_size, "weights": weights, "bits": 8 * stored / weights, "types": dict(types)}


def table(results: dict[str, Any]) -> str:
    lines = ["| model | file | MB | parameters | bits per weight | matrices |", "|---" * 6 + "|"]
    for model, result in results.items():
        dense = result["rows"]["dense"]["bytes"]
        names = {
            "its own file": "as its makers stored it", "dense": "dense, q4_k_m",
            "pruned": f"−{result['removed']:.1%} of the decoder, q4_k_m",
        }  # fmt: skip
        for row, values in result["rows"].items():
            types = ", ".join(f"{count} {name}" for name, count in values["types"].items() if name != "f32")
            size = f"{values['bytes'] / 1e6:,.0f}"
            size += f" (−{1 - values['bytes'] / dense:.0%})" if row == "pruned" else ""
            cells = [model, names[row], size, f"{values['weights'] / 1e6:,.0f} M", f"{values['bits']:.2f}", types]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
