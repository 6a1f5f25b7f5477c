"""Loading checkpoints in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PROBE = """
import json, sys, torch
loader, ids, *directories = sys.argv[1:]
if loader == "transformers":
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


def run_probe(directory: Path, loader: str, ids: list[list[int]]) -> dict[str, Any]:
    """`run_probes` of one checkpoint."""
    return run_probes([directory], loader, ids)[0]


def run_probes(directories: Sequence[Path], loader: str, ids: list[list[int]]) -> list[dict[str, Any]]:
    """Load checkpoints in one new process, by ``llmpruner`` or by ``transformers`` alone.

    ``ids``: token ids, (batch, time). Returns, for each checkpoint, its ``logits`` and the tokens that it generates
    with a cache (``cached``) and without (``plain``). Raises `AssertionError` with the last line of standard error.
    """
    command = [sys.executable, "-c", _PROBE, loader, json.dumps(ids), *map(str, directories)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise AssertionError(f"loading by {loader} failed: {done.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines()[-len(directories) :]]
