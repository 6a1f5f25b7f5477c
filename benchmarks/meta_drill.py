"""A real-sized drill: a 1.1B LLaMA in Meta's format and a Vicuna-style delta, on random weights.

    python benchmarks/meta_drill.py [--work DIR] [--shards N]

Makes the checkpoints (TinyLlama's shape: dim 2048, 22 layers, 32 heads, 4 KV heads, MLP 5632, 32000 tokens, in
float16), then runs every step in a process of its own and prints JSON: seconds, peak resident memory, and that peak
over the largest shard read. Takes about 11 GB of disk, all removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Torch is imported by the steps alone: Linux counts what this process holds into the peak of those it starts.

SHAPE = {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "vocab_size": -1, "norm_eps": 1e-5}
WIDTH, VOCABULARY = 5632, 32000
STD = 0.02


def make_meta(folder: Path, shards: int) -> None:
    """Random weights, written shard by shard; a tokenizer is not part of the drill."""
    import torch
    from llmpruner_llama.meta_format import placements
    from llmpruner_llama.meta_params import MetaParams, ffn_width

    folder.mkdir()
    params = {**SHAPE, "multiple_of": 256}
    if ffn_width(SHAPE["dim"], 256, None) != WIDTH:
        raise SystemExit("the drill's shape does not follow Meta's formula")
    (folder / "params.json").write_text(json.dumps(params))
    parsed = MetaParams.read(folder / "params.json")
    kv_rows = SHAPE["n_kv_heads"] * SHAPE["dim"] // SHAPE["n_heads"]
    rows = {"wq": 2048, "wk": kv_rows, "wv": kv_rows, "wo": 2048, "w1": WIDTH, "w3": WIDTH, "w2": 2048}
    columns = {"w2": WIDTH}
    for number in range(shards):
        generator = torch.Generator().manual_seed(number)
        state = {}
        for placement in placements(parsed, tied=False):
            kind = placement.meta.split(".")[-2]
            if placement.axis is None:
                state[placement.meta] = torch.ones(SHAPE["dim"], dtype=torch.float16)
                continue
            shape = [rows.get(kind, VOCABULARY), columns.get(kind, SHAPE["dim"])]
            shape[placement.axis] //= shards
            state[placement.meta] = (torch.randn(shape, generator=generator) * STD).half()
        torch.save(state, folder / f"consolidated.{number:02}.pth")


def make_delta(base: Path, folder: Path) -> None:
    """A delta with one more token, as Vicuna v0's, in two ``.bin`` files as they were released."""
    import torch
    from llmpruner_llama.tensors import HuggingFaceTensors

    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": VOCABULARY + 1}))
    (folder / "tokenizer.model").touch()
    source = HuggingFaceTensors(base)
    generator = torch.Generator().manual_seed(7)
    names = list(source.specs)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        state = {}
        for name in part:
            shape = list(source.specs[name].shape)
            shape[0] += shape[0] == VOCABULARY
            state[name] = (torch.randn(shape, generator=generator) * STD / 10).half()
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save(state, folder / file)
        weight_map |= dict.fromkeys(state, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def prune_and_write_back(source: Path, target: Path) -> None:
    """Cut a fifth of every MLP, and write the result in Meta's format."""
    from llmpruner_llama import LlamaFamily, MetaReader
    from llmpruner_llama.meta_writer import write_meta

    from llmpruner import build_graph
    from llmpruner.models.surgery import cut

    model = MetaReader().read_model(source, None)
    family = LlamaFamily()
    kept = list(range(WIDTH - WIDTH // 5))
    cut(model, build_graph(family, model.config), {f"layers.{n}.mlp": kept for n in range(SHAPE["n_layers"])}, family)
    write_meta(model, None, target)


def check(folder: Path) -> None:
    """The written checkpoint is a complete model in transformers' eyes."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits
    if not torch.isfinite(logits).all():
        raise SystemExit(f"{folder}: logits are not finite")


def measured(step: list[str]) -> dict[str, float]:
    """Run this script for one step, alone in a process, and report what it took."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, "--step", *step], env={**os.environ, "HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"step {step[0]} failed")
    scale = 1 if sys.platform == "darwin" else 1024
    return {"seconds": round(seconds, 1), "peak_bytes": usage.ru_maxrss * scale}


def run_step(name: str, paths: list[Path], shards: int) -> None:
    if name == "make-meta":
        make_meta(*paths, shards)
    elif name == "convert":
        from llmpruner_llama.meta_convert import convert_to_huggingface

        convert_to_huggingface(*paths, tokenizer=False)
    elif name == "delta":
        from llmpruner_vicuna.delta import apply_delta

        apply_delta(*paths)
    elif name == "imports":
        import llmpruner_vicuna.delta  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401
    else:
        steps = {"make-delta": make_delta, "prune": prune_and_write_back, "check": check}
        steps[name](*paths)


def drill(work: Path, shards: int) -> dict[str, object]:
    meta, hf, delta, total, pruned = (work / n for n in ("meta", "hf", "delta", "sum", "pruned"))
    measured(["make-meta", str(meta), "--shards", str(shards)])
    results: dict[str, object] = {"shards": shards, "imports alone": measured(["imports"])}
    largest = max(p.stat().st_size for p in meta.glob("*.pth"))
    for name, step in (
        ("convert", ["convert", str(meta), str(hf)]),
        ("make delta", ["make-delta", str(hf), str(delta)]),
        ("apply delta", ["delta", str(hf), str(delta), str(total)]),
        ("prune 20 % of the MLPs, write Meta's format", ["prune", str(meta), str(pruned)]),
    ):
        took = measured(step)
        if name != "make delta":
            results[name] = {**took, "peak_over_largest_shard": round(took["peak_bytes"] / largest, 2)}
    for folder in (hf, total):
        measured(["check", str(folder)])
    results["largest_shard_bytes"] = largest
    results["pruned_bytes"] = sum(p.stat().st_size for p in pruned.glob("*.pth"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="where to put the files (a temporary folder inside it)")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        run_step(arguments.step[0], [Path(path) for path in arguments.step[1:]], arguments.shards)
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        print(json.dumps(drill(Path(work), arguments.shards), indent=2))


if __name__ == "__main__":
    main()
