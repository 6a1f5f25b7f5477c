"""Exports that are loaded, saved and loaded again keep every byte of their weights; killed ones leave nothing."""

from __future__ import annotations

import signal

import pytest
import torch
from checkpoint_cases import INPUT_IDS
from export_cases import llama_source, logits
from fresh import run_fresh
from llmpruner_gguf import GgufExporter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmpruner import save_checkpoint
from llmpruner.exporters import StockExporter, export
from llmpruner.models.opening import forget_quantisation


def stored(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_bytes(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stock(dtype, tmp_path):
    source = llama_source("mlp-uniform", dtype)
    export(tmp_path, StockExporter(), tmp_path / "out", source.load)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    first.save_pretrained(tmp_path / "again")
    written = stored(tmp_path / "out")
    assert_same_bytes(stored(tmp_path / "again"), written)
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto").eval()
    assert_same_bytes(second.state_dict(), first.state_dict())
    own = source.model.state_dict()
    assert_same_bytes({key: own[key] for key in written}, written)
    assert torch.equal(logits(second, INPUT_IDS), logits(first, INPUT_IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gguf_gives_back_the_weights_that_were_exported(dtype, tmp_path):
    model = llama_source("mlp-uniform", dtype).model
    save_checkpoint(model, tmp_path / "source", record={}, tokenizer=None)
    export(tmp_path / "source", GgufExporter(), tmp_path / "out", llama_source("mlp-uniform", dtype).load)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="source.gguf", dtype=dtype).eval()
    forget_quantisation(first)
    first.save_pretrained(tmp_path / "again")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto").eval()
    assert_same_bytes(second.state_dict(), model.state_dict())


KILLED = """
import os, signal, sys
from pathlib import Path
from llmpruner import Exporter
from llmpruner.exporters import export

class Half(Exporter):
    name, summary = "half", "is killed after one file"

    def export(self, task):
        (task.directory / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

export(Path(sys.argv[1]), Half(), Path(sys.argv[1]) / "out", None)
"""


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    done = run_fresh(KILLED, tmp_path)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    export(tmp_path, StockExporter(), tmp_path / "out", llama_source("mlp-uniform").load)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
