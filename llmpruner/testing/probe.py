"""Loading checkpoints in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PROBE = """
import json, os, sys, torch
from transformers import AutoModelForCausalLM, PreTrainedModel

loaders, ids, *directories = sys.argv[1:]
ids = torch.tensor(json.loads(ids))
options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("llmpruner"):
            raise ModuleNotFoundError(name)

def probe(loader):
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

*others, last = loaders.split(",")
for loader in others:
    child = os.fork()
    if not child:
        probe(loader)
        sys.exit()
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
probe(last)
"""
_FORKS = sys.platform == "linux"
"""Windows has no fork, and on macOS it is unsafe once libraries are loaded."""


def run_probe(directory: Path, loader: str, ids: list[list[int]]) -> dict[str, Any]:
    """`run_probes` of one checkpoint by one loader."""
    return run_probes([directory], [loader], ids)[loader][0]


def run_probes(
    directories: Sequence[Path], loaders: Sequence[str], ids: list[list[int]]
) -> Mapping[str, list[dict[str, Any]]]:
    """Load checkpoints in new processes, one for each of ``loaders``: ``llmpruner``, or ``transformers`` alone.

    ``ids``: token ids, (batch, time). Returns, for each loader and checkpoint, the ``logits`` and the tokens that are
    generated with a cache (``cached``) and without (``plain``). Raises `AssertionError` with the last line of standard
    error. On Linux the processes are forked from one that has imported transformers, which takes most of their time.
    """
    if not _FORKS and len(loaders) > 1:
        return {loader: run_probes(directories, [loader], ids)[loader] for loader in loaders}
    command = [sys.executable, "-c", _PROBE, ",".join(loaders), json.dumps(ids), *map(str, directories)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"logits"')]
    count = len(directories)
    if done.returncode:
        loader, reason = loaders[len(found) // count], done.stderr.strip().splitlines()[-1]
        raise AssertionError(f"loading by {loader} failed: {reason}")
    return {loader: found[n * count : (n + 1) * count] for n, loader in enumerate(loaders)}
