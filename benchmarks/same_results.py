"""Proof that a move of code changes no result: the same commands with two checkouts of this repository, compared.

    python -m benchmarks.same_results OTHER_CHECKOUT                every job
    python -m benchmarks.same_results OTHER_CHECKOUT --only dense   jobs with this in their name

A job is one ``llmpruner prune`` of the demo model or of a tiny random model (dense, fused projections, mixture of
experts, ChatGLM-6B). It is equal when both plans have the same target and keep the same units of every group, and the
written safetensors hold the same tensors: names, dtypes, shapes and bytes; or when both refuse it (exit code 2). Any
other exit code is a difference. Exits with 1 when there is one.

All jobs of a checkout run in one process of their own, this checkout's first, each with OMP_NUM_THREADS threads, or 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
THREADS = os.environ.get("OMP_NUM_THREADS", "1")
PACKAGES = {"llmpruner": "llmpruner", **{f"llmpruner_{n}": f"plugins/{n}" for n in ("llama", "vicuna", "chatglm")}}
"""Package → its folder in a checkout."""

TEXT, BLOCK = "--samples 8 --set prune.length=32", "--kinds attention,mlp"
GLOBAL = "--set prune.allocation=global --set global.normalize"
ON_DEMO = {"best": "--ratio 0.2 --samples 16 --set prune.length=128", "llm-pruner": "--method llm-pruner --ratio 0.2"}
ON_TINY = {
    "l2": "--importance l2 --ratio 0.2",
    **{f"taylor {variant}": f"--importance taylor --set taylor.variant={variant} --ratio 0.2 {TEXT}"
       for variant in ("element1", "element2", "mix", "vector")},
    "best": f"--ratio 0.2 {TEXT}",
    "obs, refit": f"--importance obs --set prune.compensate=refit --ratio 0.2 {TEXT}",
    "flap, bias": f"--importance flap --set prune.compensate=bias --ratio 0.2 {TEXT}",
    "attention and mlp": f"--importance taylor {BLOCK} --ratio 0.2 {TEXT}",
    "attention and mlp, refit": f"{BLOCK} --ratio 0.2 {TEXT}",
    "query": "--importance l2 --kinds query --ratio 0.05",
    "hidden": f"--importance taylor --kinds hidden --ratio 0.2 {TEXT}",
    "expert": f"--importance taylor --kinds expert --ratio 0.2 {TEXT}",
    "layer": f"--kinds layer --ratio 0.4 {TEXT}",
    "global": f"--importance l2 {BLOCK} {GLOBAL}=parameters --ratio 0.2",
    "bytes": f"--importance l2 {BLOCK} --budget bytes --ratio 0.1",
    "macs": f"--importance l2 {BLOCK} --budget macs {GLOBAL}=parameters --ratio 0.1",
    "kv-cache": "--importance l2 --kinds attention --budget kv-cache --ratio 0.25",
    "steps": f"--importance taylor {BLOCK} --steps 2 --ratio 0.2 {TEXT}",
    "unit-ratio": f"--importance l2 {BLOCK} --set prune.unit_ratio=0.25",
}  # fmt: skip
"""Name → options of ``prune``."""
ON_PLUGINS_MODELS = {
    **{name: f"--importance {name} --ratio 0.2" for name in ("random", "l1")},
    **{name: f"--importance {name} --ratio 0.2 {TEXT}" for name in ("wanda-sp", "activation", "pca")},
    "block-influence": f"--importance block-influence --kinds layer --ratio 0.4 {TEXT}",
    **{f"global, {how}": f"--importance l2 {BLOCK} {GLOBAL}={how} --ratio 0.2"
       for how in ("mean", "max", "sum", "zscore")},
    **{f"reduction {how}": f"--importance l2 --set prune.reduction={how} --ratio 0.2"
       for how in ("mean", "max", "prod", "last")},
    "sensitivity": f"--importance l2 --set prune.allocation=sensitivity --shape free --ratio 0.2 {TEXT}",
    "layers of choice": "--importance l2 --set prune.layers=0,2 --ratio 0.1",
    "rounded": "--importance l2 --set prune.round_to=8 --ratio 0.2",
    "seed": f"--set prune.seed=3 --ratio 0.2 {TEXT}",
    "parameters": f"--importance l2 {BLOCK} --budget parameters --ratio 0.1",
    "target-params": "--importance l2 --set prune.target_params=100K",
}  # fmt: skip
"""More, for the models that a plugin knows; where discovery has to prove every cut first, a job takes seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT", help="folder of another checkout")
    parser.add_argument("--only", default="", metavar="TEXT", help="only jobs whose name has this")
    options = parser.parse_args()
    checkouts = {"this": ROOT, "other": options.other.resolve()}
    if checkouts["other"] == ROOT or not all((checkouts["other"] / place).is_dir() for place in PACKAGES.values()):
        parser.error(f"'{options.other}' is not another checkout of this repository")
    chosen = {name: words for name, words in jobs().items() if options.only in name}
    if not chosen:
        parser.error(f"no job has '{options.only}' in its name")
    with tempfile.TemporaryDirectory() as work:
        make_models(Path(work) / "models")
        this, other = (run(checkout, Path(work) / name, chosen) for name, checkout in checkouts.items())
    wrong = {name: text for name in chosen if (text := difference(this[name], other[name]))}
    for model in sorted({name.split(":")[0] for name in chosen}):
        if all(this[name]["exit"] for name in chosen if name.startswith(model)):
            wrong[model] = "no job prunes, which proves nothing"
    refused = sum(this[name]["exit"] == 2 for name in chosen if name not in wrong)
    for name, text in wrong.items():
        print(f"{name}: {text}")
    print(f"{len(chosen)} jobs, {len(wrong)} differ; {refused} are refused by both")
    sys.exit(bool(wrong))


def make_models(folder: Path) -> None:
    """Tiny models below ``folder``: the same weights each time, large enough that all of them matter."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen2MoeConfig, logging

    logging.disable_progress_bar()
    sizes = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    experts = {"num_experts": 6, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 64}
    configs = {
        "dense": LlamaConfig(**sizes, attention_bias=True, mlp_bias=True),
        "fused": Phi3Config(**sizes),
        "experts": Qwen2MoeConfig(**sizes, **experts, num_experts_per_tok=2),
    }
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(*((1.0, 0.2) if parameter.ndim == 1 else (0.0, 0.4)))
        model.save_pretrained(folder / name)
    # Random weights in the format of the release.
    shutil.copytree(ROOT / "tests" / "data" / "chatglm_v1", folder / "chatglm")


def jobs() -> dict[str, str]:
    """``MODEL: NAME`` → the words after ``llmpruner prune``."""
    named = {**ON_TINY, **ON_PLUGINS_MODELS}
    of_model = {"demo": ON_DEMO, "dense": named, "chatglm": named, "fused": ON_TINY, "experts": ON_TINY}
    return {
        f"{model}: {name}": f"{model if model == 'demo' else f'models/{model}'} {words}"
        for model, chosen in of_model.items()
        for name, words in chosen.items()
    }


def run(checkout: Path, folder: Path, chosen: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What `prune` gives for each job with the code of ``checkout``, in a process that works in ``folder``."""
    folder.mkdir()
    links = {name: checkout / place for name, place in PACKAGES.items()}
    for name, target in {**links, "benchmarks": ROOT / "benchmarks", "models": folder.parent / "models"}.items():
        (folder / name).symlink_to(target, target_is_directory=True)
    (folder / "jobs.json").write_text(json.dumps(dict(chosen)), encoding="utf-8")
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": THREADS}
    code = f"from benchmarks.same_results import inside; inside({str(checkout)!r})"
    environment = {**os.environ, **settings, "PYTHONPATH": str(folder)}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def inside(checkout: str) -> None:
    """The child: from ``jobs.json`` in the working directory to ``results.json``."""
    for package in PACKAGES:
        file = Path(str(import_module(package).__file__)).resolve()
        if not file.is_relative_to(checkout):
            raise SystemExit(f"{package} is imported from {file}, not from {checkout}")
    results = {}
    for name, words in json.loads(Path("jobs.json").read_text(encoding="utf-8")).items():
        started = time.monotonic()
        results[name] = prune(words.split(), Path("pruned"))
        took = f"exit code {results[name]['exit']}, {time.monotonic() - started:.1f} s"
        print(f"{Path.cwd().name} checkout, {name}: {took}", file=sys.stderr)
    Path("results.json").write_text(json.dumps(results), encoding="utf-8")


def prune(words: list[str], output: Path) -> dict[str, Any]:
    """``exit`` code of ``llmpruner prune WORDS``; then ``target``, ``kept`` (group → units) and ``tensors`` (name →
    digest) of what it wrote, or the ``reason`` why it wrote nothing."""
    from llmpruner.cli import main as llmpruner

    line = ["llmpruner", "prune", *words, "-o", str(output), "--json"]
    shown, errors, code = StringIO(), StringIO(), 0
    with patch.object(sys, "argv", line), redirect_stdout(shown), redirect_stderr(errors):
        try:
            llmpruner()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception as error:  # a crash is a result, too, and the other jobs go on
            code = 1
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
    try:
        if code:
            return {"exit": code, "reason": " ".join(errors.getvalue().rpartition("error:")[2].split())}
        plan = json.loads(shown.getvalue())["plan"]
        kept = {group: cut["kept"] for group, cut in plan["cuts"].items()}
        return {"exit": code, "target": plan["target"], "kept": kept, "tensors": digests(output)}
    finally:
        shutil.rmtree(output, ignore_errors=True)


def digests(folder: Path) -> dict[str, str]:
    """Tensor → its dtype, shape, and SHA-256 of its bytes."""
    from safetensors import deserialize

    tensors = [tensor for file in sorted(folder.glob("*.safetensors")) for tensor in deserialize(file.read_bytes())]
    return {name: f"{t['dtype']} {t['shape']} {hashlib.sha256(t['data']).hexdigest()}" for name, t in tensors}


def difference(this: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In words; empty where both prune alike, or both refuse (exit code 2)."""
    codes = [this["exit"], other["exit"]]
    if codes == [2, 2]:
        return ""
    if codes != [0, 0]:
        return " and ".join(f"exit code {side['exit']} ({side.get('reason', 'pruned')})" for side in (this, other))
    for part in ("target", "kept", "tensors"):
        names = sorted(n for n in {*this[part], *other[part]} if this[part].get(n) != other[part].get(n))
        if names:
            return f"{part}: {len(names)} differ, {', '.join(names[:3])} first"
    return ""


if __name__ == "__main__":
    main()
