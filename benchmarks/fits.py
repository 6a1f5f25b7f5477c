"""What fits where, computed from the forecasts of memory: the table in ``docs/how-to/scale.md``. Nothing is measured.

python -m benchmarks.fits
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig

from llmpruner import LoadSettings, load_catalog
from llmpruner.discovery.opening import Opener
from llmpruner.models.model import Structure
from llmpruner.pruning.forecast import needed_bytes
from llmpruner.pruning.job import prune_job
from llmpruner.recovery.data import recovery_setup
from llmpruner.recovery.forecast import estimate
from llmpruner.settings import PruneSettings, RecoverSettings

from .measure import write_table

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "scale.md"
SHAPES = {
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "8B": (4096, 14_336, 32, 32, 8, 128_256, False),
    "70B": (8192, 28_672, 80, 64, 8, 128_256, False),
}
"""Hidden channels, MLP channels, layers, query heads, KV heads, tokens, tied: as Qwen2.5 1.5B, and Llama 3.1."""
DEVICES = {"8 GB": (8, 1), "24 GB": (24, 1), "80 GB": (80, 1), "8 × 80 GB": (80, 8)}
"""GiB of memory of each GPU, and how many."""
FREE = 0.95
"""The share of its memory that a process can take; the rest is the driver's."""
METHODS, STRATEGIES = ("fast", "best"), ("lora", "distil", "full")


def main() -> None:
    opener = Opener(load_catalog(), LoadSettings(dtype="bfloat16", device="cpu"))
    lines = ["| model | | " + " | ".join(DEVICES) + " |", "|---|---|" + "---|" * len(DEVICES)]
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            structure = structure_of(name, Path(folder), opener)
            for work, cells in {**prunes(structure, opener), **recoveries(structure, opener)}.items():
                lines.append(f"| {name} | `{work}` | {' | '.join(cells)} |")
    write_table(PAGE, "fits", "\n".join(lines))


def structure_of(name: str, folder: Path, opener: Opener) -> Structure:
    hidden, mlp, layers, heads, kv_heads, tokens, tied = SHAPES[name]
    LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=tokens, tie_word_embeddings=tied, max_position_embeddings=8192,
        dtype=torch.bfloat16, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return opener.structure(folder)


def prunes(structure: Structure, opener: Opener) -> dict[str, list[str]]:
    rows = {}
    for method in METHODS:
        settings = PruneSettings(ratio=0.2, method=method, calibration="wikitext2")
        needed, _ = needed_bytes(prune_job(settings, opener.catalog), structure, 2)
        ways = {"in memory": needed[False], "layer by layer": needed[True]}
        rows[f"prune --method {method}"] = [cell(ways, size) for size, _ in DEVICES.values()]
    return rows


def recoveries(structure: Structure, opener: Opener) -> dict[str, list[str]]:
    rows = {}
    for strategy in STRATEGIES:
        setup = recovery_setup(RecoverSettings(data="rows.jsonl", strategy=strategy), opener.catalog)
        whole, rows[f"recover --strategy {strategy}"] = estimate(setup, structure, structure, opener.load), []
        for size, count in DEVICES.values():
            ways = {
                f"{'shards' if shards > 1 else 'whole'}{', recomputing' if again else ''}": replace(
                    whole, shards=shards, recomputes=again
                ).memory
                for shards in sorted({1, count})
                for again in (False, True)
            }
            rows[f"recover --strategy {strategy}"].append(cell(ways, size))
    return rows


def cell(ways: dict[str, int], size: int) -> str:
    """The first way that fits into ``size`` GiB, or the memory that is needed."""
    fitting = next((way for way in ways.items() if way[1] <= FREE * size * 2**30), None)
    if fitting is None:
        return f"– ({min(ways.values()) / 2**30:.0f} GiB)"
    return f"{fitting[0]}, {fitting[1] / 2**30:.1f} GiB"


if __name__ == "__main__":
    main()
