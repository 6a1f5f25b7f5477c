"""Loads checkpoints in a fresh process and prints how far their logits are from the expected ones.

    python checkpoint_probe.py MODE DIRECTORY…

MODE: ``remote`` (llmpruner cannot be imported; remote code is trusted for shims alone), ``registered``
(AutoModel after ``llmpruner.register()``, remote code refused) or ``load_pruned``. Beside each DIRECTORY lies
``DIRECTORY.expected``, a safetensors file with the inputs and the logits of the model that was saved.
"""

import importlib.abc
import json
import sys
import tempfile
from pathlib import Path

MODE, *DIRECTORIES = sys.argv[1:]


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0].startswith("llmpruner"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


if MODE == "remote":
    sys.meta_path.insert(0, Blocker())

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402


def load(directory, **options):
    if MODE == "load_pruned":
        import llmpruner

        return llmpruner.load_pruned(directory, **options)
    trust = MODE == "remote" and (directory / "modeling_llmpruner.py").exists()
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust, **options).eval()


def headless(directory, model, ids):
    """How far the hidden states of AutoModel are from those of ``model``; its shapes without weights must be the same
    (vLLM builds it so)."""
    options = {"trust_remote_code": MODE != "registered" and (directory / "modeling_llmpruner.py").exists()}
    decoder = AutoModel.from_pretrained(directory, **options).eval()
    with torch.device("meta"):
        empty = AutoModel.from_config(AutoConfig.from_pretrained(directory, **options), **options)
    shapes, expected = ({n: p.shape for n, p in each.named_parameters()} for each in (empty, decoder))
    assert shapes == expected
    with torch.no_grad():
        ours = decoder(ids).last_hidden_state
        theirs = getattr(model, model.base_model_prefix)(ids).last_hidden_state
    return float((ours - theirs).abs().max())


def probe(directory):
    expected = load_file(f"{directory}.expected")
    ids = expected["input_ids"]

    def distance(model, name):
        with torch.no_grad():
            return float((model(ids).logits - expected[name]).abs().max())

    found = {"eager": distance(load(directory, attn_implementation="eager"), "eager")}
    placed = {"device": "cpu"} if MODE == "load_pruned" else {"device_map": "cpu"}
    model = load(directory, **placed)
    found["default"] = distance(model, "default")
    found["class"] = type(model).__name__
    found["bfloat16"] = distance(load(directory, dtype=torch.bfloat16), "bfloat16")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, use_cache=False, **options)
    for cache in ("dynamic", "static"):
        cached = model.generate(ids, cache_implementation=cache, **options)
        found[f"{cache} cache"] = float((plain != cached).sum())
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        found["saved again"] = distance(load(Path(again)), "default")
        found["files"] = sorted(file.name for file in Path(again).iterdir())
    found["headless"] = headless(directory, model, ids)
    found["tied"] = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return found


if MODE == "registered":
    import llmpruner

    llmpruner.register()
results = {Path(directory).name: probe(Path(directory)) for directory in DIRECTORIES}
own = sorted(name for name in sys.modules if name.partition(".")[0] == "llmpruner")
sys.stdout.write("RESULT " + json.dumps({"modules": own, "found": results}))
