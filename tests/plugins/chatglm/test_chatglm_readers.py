"""Original checkpoints in every shape they come in, and the messages for damaged ones."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_tiny import DATA, train_sentencepiece
from llmpruner_chatglm import ChatGLMFamily, ChatGLMReader
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import llmpruner
from llmpruner import LlmprunerError, ModelError

TENSORS = load_file(DATA / "chatglm2" / "model.safetensors")
BIN, SAFE = "pytorch_model.bin", "model.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    shutil.copyfile(DATA / "chatglm2" / "config.json", tmp_path / "config.json")
    return tmp_path


def write_shards(directory: Path, tensors: dict[str, torch.Tensor], file: str) -> None:
    """Three files instead of ``file``, and their index."""
    stem, _, suffix = file.partition(".")
    names = [f"{stem}-{n:05d}-of-00003.{suffix}" for n in (1, 2, 3)]
    for number, name in enumerate(names):
        part = {k: v for n, (k, v) in enumerate(tensors.items()) if n % 3 == number}
        (save_file if file == SAFE else torch.save)(part, directory / name)
    table = {k: names[n % 3] for n, k in enumerate(tensors)}
    (directory / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


WRITERS: dict[str, Callable[[Path, dict[str, torch.Tensor]], Any]] = {
    "one .bin": lambda d, t: torch.save(t, d / BIN),
    "one .bin of old torch": lambda d, t: torch.save(t, d / BIN, _use_new_zipfile_serialization=False),
    "three .bin": lambda d, t: write_shards(d, t, BIN),
    "three safetensors": lambda d, t: write_shards(d, t, SAFE),
    "one safetensors": lambda d, t: save_file(t, d / SAFE),
    "safetensors preferred": lambda d, t: (save_file(t, d / SAFE), (d / BIN).touch()),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_file_layout_gives_the_same_model(checkpoint: Path, writer: str) -> None:
    WRITERS[writer](checkpoint, {k: v.half() for k, v in TENSORS.items()})
    model = ChatGLMReader().read_model(checkpoint, torch.float32)
    expected = ChatGLMReader().read_model(DATA / "chatglm2", None).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    storages = {p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in model.parameters()}
    assert storages == {True}, "a parameter keeps a larger tensor in memory"
    stored = ChatGLMReader().read_model(checkpoint, None)
    assert {p.dtype for p in stored.parameters()} == {torch.float16}
    assert stored.config.dtype == torch.float16
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))


def changed(folder: str, target: Path, **values: Any) -> Path:
    """A copy of the checkpoint ``folder``, with other values in its configuration."""
    shutil.copytree(DATA / folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | values))
    return target


def test_rope_ratio_and_generation_config_are_taken_over(tmp_path: Path) -> None:
    folder = changed("chatglm3", tmp_path / "m", rope_ratio=500)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.8}))
    model = ChatGLMReader().read_model(folder, None)
    assert model.config.rope_parameters["rope_theta"] == 5_000_000
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.5
    assert model.generation_config.eos_token_id == [2, 7]


def test_chatglm2_with_long_context_divides_positions(tmp_path: Path) -> None:
    """Position interpolation: token 3r has the position of token 3 of the short model."""
    folder = changed("chatglm2", tmp_path / "m", rope_ratio=4)
    train_sentencepiece(folder / "tokenizer", "bpe", [])
    long, short = (ChatGLMReader().read_model(d, None) for d in (folder, DATA / "chatglm2"))
    ids, positions = torch.tensor([[190, 192, 7, 8, 9]]), torch.arange(5)[None]
    with torch.no_grad():
        got = long(ids, position_ids=4 * positions).logits
        assert (got - short(ids, position_ids=positions).logits).abs().max() < 1e-5
        assert (got - long(ids, position_ids=positions).logits).abs().max() > 1e-3


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def halved(file: Path, write: Callable[..., Any]) -> None:
    write(TENSORS, file)
    os.truncate(file, file.stat().st_size // 2)


def save_with(directory: Path, **changes: torch.Tensor) -> None:
    save_file({**TENSORS, **changes}, directory / SAFE)


NORM = "transformer.encoder.final_layernorm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda d: None, "holds no weights"),
    "missing shard": (
        lambda d: (write_shards(d, TENSORS, BIN), (d / "pytorch_model-00002-of-00003.bin").unlink()),
        "Missing key",
    ),
    "truncated safetensors": (lambda d: halved(d / SAFE, save_file), r"model\.safetensors is damaged"),
    "truncated bin": (lambda d: halved(d / BIN, torch.save), r"model\.bin is damaged"),
    "code": (lambda d: (d / BIN).write_bytes(pickle.dumps({"a": Code(d / "ran")})), "pickled code, which is never run"),
    "code in a zip": (lambda d: torch.save({"a": Code(d / "ran")}, d / BIN), "pickled code, which is never run"),
    "no dictionary": (lambda d: torch.save([1, 2], d / BIN), "is damaged"),
    "missing tensor": (lambda d: save_file(dict(list(TENSORS.items())[1:]), d / SAFE), "Missing key"),
    "unknown tensor": (lambda d: save_with(d, **{"transformer.prefix.weight": torch.ones(2)}), "Unexpected key"),
    "misshapen tensor": (lambda d: save_with(d, **{NORM: TENSORS[NORM][:-1].clone()}), "size mismatch for"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_line(checkpoint: Path, what: str) -> None:
    damage, message = DAMAGE[what]
    damage(checkpoint)
    with pytest.raises(LlmprunerError, match=message) as caught:
        ChatGLMReader().read_model(checkpoint, None)
    assert "\n" not in str(caught.value)
    assert not (checkpoint / "ran").exists()


@pytest.mark.parametrize(("folder", "change", "message"), [
    ("chatglm_v1", {"quantization_bit": 4}, "quantized to 4 bits"),
    ("chatglm_v1", {"pre_seq_len": 128}, "P-tuning prefix"),
    ("chatglm2", {"quantization_bit": 8}, "quantization_bit is 8"),
    ("chatglm2", {"add_bias_linear": True}, "add_bias_linear"),
    ("chatglm2", {"num_layers": "many"}, "cannot load model .*'num_hidden_layers'"),
])  # fmt: skip
def test_variants_that_cannot_be_read_exactly_are_refused(
    folder: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        llmpruner.discover(changed(folder, tmp_path / "m", **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("folder", "file"), [("chatglm_v1", "ice_text.model"), ("chatglm2", "tokenizer.model")])
def test_a_damaged_vocabulary_is_one_line(folder: str, file: str, tmp_path: Path) -> None:
    shutil.copytree(DATA / folder, tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    (tmp_path / "m" / file).write_bytes(b"not a model")
    with pytest.raises(ModelError, match="cannot load model") as caught:
        llmpruner.load(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_later_generations_are_refused_by_the_class_of_the_first() -> None:
    ChatGLMFamily().register_models()
    with pytest.raises(Exception, match="ChatGLM2, ChatGLM3 or GLM-4"):
        AutoConfig.from_pretrained(DATA / "chatglm2")
