"""Prune a tiny model with the llmpruner that is installed next to the Python that runs this."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import llmpruner

CHECKOUT = Path(__file__).resolve().parents[1]
PROGRAM = shutil.which("llmpruner", path=str(Path(sys.executable).parent)) or "llmpruner"


def main() -> None:
    assert CHECKOUT not in Path(llmpruner.__file__).parents, "this is the checkout, not an installed wheel"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps files that are mapped
        told = run(folder, "--version")
        assert told == f"llmpruner {version('llmpruner')}\n", told
        dense = make_model(Path(folder, "dense"))
        run(folder, "prune", "dense", "--ratio", "0.2", "--importance", "l2", "-o", "pruned")
        check_model(Path(folder, "pruned"), dense)
    print(told.strip(), "of", Path(llmpruner.__file__).parent, "pruned a model that transformers loads")


def run(folder: str, *words: str) -> str:
    return subprocess.run([PROGRAM, *words], cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def make_model(folder: Path) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    return config


def check_model(folder: Path, dense: LlamaConfig) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM
    assert model.config.intermediate_size < dense.intermediate_size
    in_memory = model.state_dict()
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, in_memory[name]), name
    print(f"MLPs of {dense.intermediate_size} channels have {model.config.intermediate_size}")


if __name__ == "__main__":
    main()
