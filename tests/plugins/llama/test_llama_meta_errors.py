"""What a user can get wrong with a Meta folder: one clear line each, and nothing written."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_cases import copy_of, resave, set_param
from llmpruner_llama import MetaReader

from llmpruner import CheckpointError


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran-code",)


def truncate(folder: Path) -> None:
    file = folder / "consolidated.01.pth"
    file.write_bytes(file.read_bytes()[:-2000])


def rename_tensor(state: dict[str, Any]) -> None:
    state["layers.0.attention.gate.weight"] = state.pop("layers.0.attention_norm.weight")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "last shard missing": (
        lambda f: (f / "consolidated.01.pth").unlink(),
        r"1 shards and .* a consolidated\.NN\.pth is missing",
    ),
    "first shard missing": (
        lambda f: (f / "consolidated.00.pth").unlink(),
        r"1 shards and .* a consolidated\.NN\.pth is missing",
    ),
    "no shard at all": (
        lambda f: [(f / f"consolidated.0{n}.pth").unlink() for n in (0, 1)],
        r"has no consolidated\.NN\.pth",
    ),
    "a shard too many": (
        lambda f: (f / "consolidated.02.pth").write_bytes((f / "consolidated.01.pth").read_bytes()),
        r"3 shards and .* a consolidated",
    ),
    "no params.json": (lambda f: (f / "params.json").unlink(), r"it has no params\.json"),
    "whole numbers": (
        lambda f: [resave(f, n, lambda s: s.update({"norm.weight": s["norm.weight"].int()})) for n in (0, 1)],
        r"is not a plain dictionary of floating-point tensors",
    ),
    "params.json is no JSON": (lambda f: (f / "params.json").write_text("{"), r"params\.json cannot be read"),
    "dim is missing": (lambda f: (f / "params.json").write_text("{}"), r"params\.json: dim is .*: Field required"),
    "dim of another model": (lambda f: set_param(f, dim=96), r"a consolidated.NN.pth is missing, or of another model"),
    "width of another model": (
        lambda f: set_param(f, multiple_of=100),
        r"\(128, 48\); .* makes it \(200, 48\)",
    ),
    "heads of another model": (lambda f: set_param(f, n_kv_heads=3), r"k_proj\.weight has shape|do not belong"),
    "heads that do not divide": (lambda f: set_param(f, n_kv_heads=4), r"n_kv_heads 4 do not fit"),
    "fewer layers than weights": (lambda f: set_param(f, n_layers=1), r"layers\.1\.\S+, which no LLaMA"),
    "unknown tensor": (lambda f: resave(f, 0, rename_tensor), r"lacks layers\.0\.attention_norm\.weight"),
    "shards of two checkpoints": (
        lambda f: resave(f, 1, lambda s: s.update({"output.weight": torch.zeros(7, 48)})),
        r"lm_head\.weight has shape \(57, 48\)",
    ),
    "truncated": (truncate, r"consolidated\.01\.pth is truncated"),
    "empty file": (lambda f: (f / "consolidated.00.pth").write_bytes(b""), r"00\.pth is truncated"),
    "code inside": (
        lambda f: torch.save({"a": Code()}, f / "consolidated.00.pth"),
        r"could run code: it was not loaded",
    ),
    "code in a bare pickle": (
        lambda f: (f / "consolidated.00.pth").write_bytes(pickle.dumps({"a": Code()})),
        r"consolidated\.00\.pth is truncated, or not a checkpoint",
    ),
    "damaged tokenizer": (
        lambda f: (f / "tokenizer.model").write_bytes(b"\x00junk"),
        r"neither a SentencePiece model nor a tiktoken file",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_line_and_nothing_is_written(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    damage, message = DAMAGE[what]
    folder = copy_of("mha", "2shards", tmp_path / "in" / "meta", tokenizer=True)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        MetaReader().read_model(folder, None)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert MetaReader().recognises(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = copy_of("mha", "1shard", tmp_path / "meta", tokenizer=True)
    for name in ("tok_embeddings.weight", "output.weight"):
        resave(folder, 0, lambda state, name=name: state.update({name: state[name][:50].clone()}))
    with pytest.raises(CheckpointError, match="tokenizer has 84 tokens, its embedding 50 rows"):
        MetaReader().read_model(folder, None)
