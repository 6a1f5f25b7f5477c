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
from llmpruner_llama.meta_convert import convert_to_huggingface

from llmpruner import CheckpointError, LlmprunerError, OutputError


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
        r"has 1 of 2 shards: consolidated\.01\.pth missing",
    ),
    "first shard missing": (
        lambda f: (f / "consolidated.00.pth").unlink(),
        r"lacks shard consolidated\.00\.pth",
    ),
    "all shards missing": (
        lambda f: [p.unlink() for p in f.glob("*.pth")],
        r"consolidated\.00\.pth is missing",
    ),
    "a shard too many": (
        lambda f: (f / "consolidated.02.pth").write_bytes((f / "consolidated.01.pth").read_bytes()),
        r"has 3 of 2 shards",
    ),
    "no params.json": (lambda f: (f / "params.json").unlink(), r"it has no params\.json"),
    "whole numbers": (
        lambda f: [resave(f, n, lambda s: s.update({"norm.weight": s["norm.weight"].int()})) for n in (0, 1)],
        r"norm\.weight is stored as torch\.int32; expected floating-point",
    ),
    "params.json is no JSON": (lambda f: (f / "params.json").write_text("{"), r"is not valid JSON"),
    "dim is missing": (lambda f: (f / "params.json").write_text("{}"), r"n_heads is None; expected"),
    "dim of another model": (lambda f: set_param(f, dim=96), r"belong to different models"),
    "width of another model": (lambda f: set_param(f, multiple_of=100), r"MLP 200 wide, .* make it 128"),
    "vocabulary of another model": (lambda f: set_param(f, vocab_size=99), r"vocab_size 99, .* has 100 rows"),
    "heads of another model": (lambda f: set_param(f, n_kv_heads=3), r"attention\.wk.* it \(24, 48\)"),
    "heads that do not divide": (lambda f: set_param(f, n_kv_heads=4), r"n_kv_heads 4 do not fit"),
    "more layers than weights": (lambda f: set_param(f, n_layers=3), r"lacks layers\.2\."),
    "fewer layers than weights": (lambda f: set_param(f, n_layers=1), r"layers\.1\.\S+, which no LLaMA"),
    "unknown tensor": (lambda f: resave(f, 0, rename_tensor), r"lacks layers\.0\.attention_norm\.weight"),
    "shards of two checkpoints": (
        lambda f: resave(f, 1, lambda s: s.update({"output.weight": torch.zeros(7, 48)})),
        r"output\.weight differs in shape or type from shard to shard",
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
    "no dictionary of tensors": (
        lambda f: torch.save({"a": 1}, f / "consolidated.00.pth"),
        r"not a plain dictionary of tensors",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.model").unlink(),
        r"has no tokenizer\.model, nor has the folder above",
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
        convert_to_huggingface(folder, tmp_path / "out")
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


def test_reading_finds_the_same_faults(tmp_path: Path) -> None:
    folder = copy_of("mha", "2shards", tmp_path / "meta")
    truncate(folder)
    for read in (MetaReader().read_config, lambda f: MetaReader().read_model(f, None)):
        with pytest.raises(CheckpointError, match="is truncated"):
            read(folder)


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    folder = copy_of("mha", "1shard", tmp_path / "meta")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="exists already"):
        convert_to_huggingface(folder, tmp_path / "out", tokenizer=False)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmpruner_llama.meta_format import MetaTensors

    folder = copy_of("mha", "1shard", tmp_path / "meta")
    read = MetaTensors.read

    def failing(self: MetaTensors, name: str) -> torch.Tensor:
        if name.startswith("model.layers.1."):
            raise CheckpointError("half way")
        return read(self, name)

    monkeypatch.setattr(MetaTensors, "read", failing)
    with pytest.raises(LlmprunerError, match="half way"):
        convert_to_huggingface(folder, tmp_path / "out", tokenizer=False)
    assert [p.name for p in tmp_path.iterdir()] == ["meta"]
