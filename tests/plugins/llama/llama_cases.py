"""The golden Meta checkpoints, and copies of them to damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from llmpruner_llama import MetaReader
from llmpruner_llama.meta_format import write_meta
from safetensors.torch import load_file

from llmpruner import new_directory

DATA = Path(__file__).parents[2] / "data" / "meta_llama"
TOKENIZER = Path(__file__).parents[2] / "data" / "vicuna" / "delta_v1" / "base" / "tokenizer.model"
"""A SentencePiece model of 84 tokens, fewer than either checkpoint has."""
MODELS = ("mha", "gqa")
LAYOUTS = ("1shard", "2shards")


def read(folder: Path) -> Any:
    return MetaReader().read_model(folder, torch.float32)


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.float()(tokens).logits


def tokens_of(name: str) -> torch.Tensor:
    return load_file(DATA / name / "cases.safetensors")["tokens"].long()


def copy_of(name: str, layout: str, target: Path, *, tokenizer: bool = False) -> Path:
    shutil.copytree(DATA / name / layout, target)
    if tokenizer:
        shutil.copyfile(TOKENIZER, target / "tokenizer.model")
    return target


def set_param(folder: Path, **values: Any) -> None:
    file = folder / "params.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def resave(folder: Path, number: int, change: Any) -> None:
    """Write shard ``number`` again, after ``change`` was applied to its dictionary."""
    file = folder / f"consolidated.{number:02}.pth"
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


def write(model: Any, tokenizer: Path | None, folder: Path, shards: int = 1) -> None:
    with new_directory(folder) as partial:
        write_meta(model, tokenizer, partial, shards)
