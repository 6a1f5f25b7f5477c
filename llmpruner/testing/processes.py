"""Loading checkpoints in another process, with and without llmpruner."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PROBE = """
import json, sys, torch
from transformers import AutoModelForCausalLM

loader, ids, *directories = sys.argv[1:]
ids = torch.tensor(json.loads(ids))
options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("llmpruner"):
            raise ModuleNotFoundError(name)

if loader == "transformers":
    sys.meta_path.insert(0, Block())
    def load(directory):
        return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
else:
    from llmpruner import load_pruned as load
for directory in directories:
    model = load(directory)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    cached = model.generate(ids, use_cache=True, **options)
    plain = model.generate(ids, use_cache=False, **options)
    print(json.dumps({"logits": logits.tolist(), "cached": cached.tolist(), "plain": plain.tolist()}), flush=True)
"""


def run_probe(directories: Sequence[Path], loader: str, ids: list[list[int]]) -> list[dict[str, Any]]:
    """Load checkpoints in a new process, by ``loader``: ``llmpruner``, or ``transformers`` alone. ``ids``: token ids,
    (batch, time). Returns, for each, the ``logits`` and the tokens generated with a cache (``cached``) and without
    (``plain``)."""
    done = run_python(_PROBE, loader, json.dumps(ids), *directories)
    if done.returncode:
        raise AssertionError(f"loading by {loader} failed: {done.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"logits"')]


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``python -c CODE ARGUMENTS``."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
