"""Loading a checkpoint where nothing is left of the process that wrote it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PROBE = """
import json, sys, torch
who, ids, *directories = sys.argv[1:]
if who == "stranger":
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0].startswith("llmpruner"):
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Block())
    from transformers import AutoModelForCausalLM
    def load(directory):
        return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
else:
    from llmpruner import load_pruned as load
ids = torch.tensor(json.loads(ids))
options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
for directory in directories:
    model = load(directory)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    cached = model.generate(ids, use_cache=True, **options)
    plain = model.generate(ids, use_cache=False, **options)
    print(json.dumps({"logits": logits.tolist(), "cached": cached.tolist(), "plain": plain.tolist()}))
"""


def run_probe(directory: Path, who: str, ids: list[list[int]]) -> dict[str, Any]:
    """`run_probes` of one checkpoint."""
    return run_probes([directory], who, ids)[0]


def run_probes(directories: Sequence[Path], who: str, ids: list[list[int]]) -> list[dict[str, Any]]:
    """Load checkpoints in one fresh process, as ``llmpruner`` or as a ``stranger`` without it.

    ``ids``: token ids, (batch, time). Returns, for each checkpoint, its ``logits`` and what it generates ``cached`` and
    ``plain`` (without a cache). Raises `AssertionError` with the process's last words.
    """
    command = [sys.executable, "-c", _PROBE, who, json.dumps(ids), *map(str, directories)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise AssertionError(f"loading as {who} failed: {done.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines()[-len(directories) :]]
