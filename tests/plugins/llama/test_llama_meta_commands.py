"""A folder in Meta's format at the command line: export in both directions, pruning with and without a tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from llama_cases import DATA, TOKENIZER, copy_of, logits, read, tokens_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from llmpruner.cli.app import build_app


def run(*arguments: Any) -> None:
    assert CliRunner().invoke(build_app(), list(map(str, arguments))).exit_code == 0


def test_meta_to_hugging_face_and_back(tmp_path: Path) -> None:
    folder = copy_of("gqa", "2shards", tmp_path / "meta", tokenizer=True)
    run("export", folder, "--to", "stock", "-o", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    expected = load_file(DATA / "gqa" / "cases.safetensors")["logits_full"]
    assert (logits(model, tokens_of("gqa")) - expected).abs().max() <= 2e-5
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hf")) == 84
    run("export", tmp_path / "hf", "-o", tmp_path / "back", "--to", "meta", "--set", "meta.shards=2")
    assert torch.equal(logits(read(tmp_path / "back"), tokens_of("gqa")), logits(model, tokens_of("gqa")))
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


def test_pruning_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    """A tokenizer beside the folder counts."""
    folder = copy_of("mha", "2shards", tmp_path / "llama" / "7B")
    command = ("prune", folder, "--ratio", 0.1, "--set", "prune.layers=all", "--importance", "l1")
    run(*command, "-o", tmp_path / "weights")
    assert not list((tmp_path / "weights").glob("tokenizer*"))
    shutil.copyfile(TOKENIZER, folder.parent / "tokenizer.model")
    run(*command, "-o", tmp_path / "whole")
    assert AutoTokenizer.from_pretrained(tmp_path / "whole")("Hello")["input_ids"]
