"""What would make a wrong model or lose a file: incomplete checkpoints, outputs that are no plain files, odd text."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmpruner

DOWN = "model.layers.1.mlp.down_proj.weight"
L2 = ("--ratio", "0.2", "--importance", "l2")


def damaged(dense, folder, change):
    """A copy of the model ``dense`` whose tensors ``change`` edits in place."""
    shutil.copytree(dense, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(DOWN), f"lacks tensor '{DOWN}'"),
        (lambda t: (t.pop(DOWN), t.pop("model.norm.weight")), "and 1 more"),
        (lambda t: t.update({DOWN: torch.zeros(3, 5)}), DOWN),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(48)}), "mlp.up_proj.bias"),
    ],
    ids=["missing", "two missing", "another shape", "a bias that the model does not use"],
)
def test_an_incomplete_checkpoint_is_refused(run, dense, tmp_path, change, message):
    model = damaged(dense, tmp_path / "model", change)
    done = run("prune", model, *L2, "-o", tmp_path / "out")
    assert done.code == 2 and message in done.err.splitlines()[-1] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"noise" * 99, None], ids=["empty", "noise", "truncated"])
def test_a_damaged_shard_of_a_dense_model_is_named(refused, dense, tmp_path, content):
    model = shutil.copytree(dense, tmp_path / "model")
    llmpruner.load(dense).model.save_pretrained(model, max_shard_size="40KB")
    (model / "model.safetensors").unlink()
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-9] if content is None else content)
    for arguments in (("plan", model, *L2), ("generate", model, "-p", "x")):
        assert f"{shard} is missing or damaged" in refused(*arguments, read=True)


def head_of_its_own(model):
    """A checkpoint that stores a head, and a configuration that ties it to the embeddings."""
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))


def read_by_layer(monkeypatch):
    """Otherwise the free memory, and what other tests left in this process, decide."""
    monkeypatch.setattr("llmpruner.pruning.forecast.free_memory", lambda: 0)


@pytest.mark.parametrize("command", ["prune", "prune by layer", "recover", "evaluate", "export"])
def test_a_head_that_would_be_left_out_is_refused(run, dense, shared, tmp_path, command, monkeypatch):
    if command == "prune by layer":
        read_by_layer(monkeypatch)
    model = shutil.copytree(dense, tmp_path / "model")
    head_of_its_own(model)
    out = ("-o", tmp_path / "out")
    arguments = {
        "prune": (model, *L2, *out),
        "prune by layer": (model, *L2, *out),
        "recover": (model, "--data", shared / "data.jsonl", "--max-steps", "1", "--strategy", "full", *out),
        "evaluate": (model, "--metrics", "size"),
        "export": (model, "--to", "stock", *out),
    }[command]
    done = run(command.split()[0], *arguments)
    assert done.code == 2 and "differ, but the configuration ties them" in done.err.splitlines()[-1], done.err
    assert not (tmp_path / "out").exists()
