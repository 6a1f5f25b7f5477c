"""Loading checkpoints in another process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .fresh import run_fresh

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
    found = {"logits": logits.tolist(), "cached": cached.tolist(), "plain": plain.tolist()}
    print(json.dumps(found), flush=True)
"""


def run_probe(directory: Path, loader: str, ids: list[list[int]]) -> dict[str, Any]:
    """`run_probes` of one checkpoint by one loader."""
    return run_probes([directory], [loader], ids)[loader][0]


def run_probes(
    directories: Sequence[Path], loaders: Sequence[str], ids: list[list[int]]
) -> Mapping[str, list[dict[str, Any]]]:
    """Load checkpoints in new processes, one for each of ``loaders``: ``llmpruner``, or ``transformers`` alone.

    ``ids``: token ids, (batch, time). Returns, for each loader and checkpoint, the ``logits`` and the tokens that are
    generated with a cache (``cached``) and without (``plain``). Raises `AssertionError` with the last line of standard
    error.
    """
    return {loader: _probe(directories, loader, ids) for loader in loaders}


def _probe(directories: Sequence[Path], loader: str, ids: list[list[int]]) -> list[dict[str, Any]]:
    done = run_fresh(_PROBE, loader, json.dumps(ids), *directories)
    if done.returncode:
        raise AssertionError(f"loading by {loader} failed: {done.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"logits"')]
