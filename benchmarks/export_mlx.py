"""Pruned models in mlx-lm: the same check as `benchmarks.export_vllm` makes in vLLM.

    LLMPRUNER_DATA=… python -m benchmarks.export_mlx --mlx PYTHON

PYTHON: the interpreter of an environment with mlx-lm and without llmpruner (``pip install mlx-lm``, on Linux with
``mlx[cpu]``). In float32, its greedy 32 tokens on ten prompts are compared with those of transformers; ``--work``
and ``--only`` as there. Writes ``benchmarks/results/export_mlx.json``.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from .export_vllm import Parts, checked, prepared, served
from .measure import as_json

RESULTS = Path(__file__).parent / "results" / "export_mlx.json"
CASES = {
    "uniform": ("uniform", "uniform"),
    "qwen": ("qwen", "qwen"),
    "free, exported to stock": ("free-stock", "free"),
    "free, exported to nemotron-nas": ("free-nemotron-nas", "free"),
    "mixtral, half of the experts": ("mixtral-half", "mixtral-half"),
    "qwen3_moe, half of the experts": ("qwen3_moe-half", "qwen3_moe-half"),
}
"""Name → the directory that is run, and the checkpoint whose outputs it must give."""


def main() -> None:
    print(as_json(checked(__doc__, "mlx", check, RESULTS)["mlx"]))


def check(python: Path, work: Path, wanted: Collection[str]) -> Parts:
    yield from prepared(work, wanted)
    cases = {name: case for name, case in CASES.items() if case[1] in wanted}
    yield "mlx", {name: served(python, work, "mlx", *case, trust=False) for name, case in cases.items()}


if __name__ == "__main__":
    main()
