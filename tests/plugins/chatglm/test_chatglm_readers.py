"""Original checkpoints in every shape they come in, and the messages for damaged ones."""

from __future__ import annotations

import json
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


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy without weights."""
    shutil.copyfile(DATA / "chatglm2" / "config.json", tmp_path / "config.json")
    return tmp_path


def write_shards(directory: Path, tensors: dict[str, torch.Tensor], suffix: str, shards: int = 3) -> None:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{stem}-{n:05d}-of-{shards:05d}.{suffix}" for n in range(1, shards + 1)]
    for number, name in enumerate(names):
        part = {k: v for n, (k, v) in enumerate(tensors.items()) if n % shards == number}
        if suffix == "safetensors":
            save_file(part, directory / name)
        else:
            torch.save(part, directory / name)
    table = {k: names[n % shards] for n, k in enumerate(tensors)}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


WRITERS: dict[str, Callable[[Path, dict[str, torch.Tensor]], None]] = {
    "one .bin": lambda d, t: torch.save(t, d / "pytorch_model.bin"),
    "one .bin of old torch": lambda d, t: torch.save(t, d / "pytorch_model.bin", _use_new_zipfile_serialization=False),
    "three .bin": lambda d, t: write_shards(d, t, "bin"),
    "three safetensors": lambda d, t: write_shards(d, t, "safetensors"),
    "one safetensors": lambda d, t: save_file(t, d / "model.safetensors"),
    "safetensors preferred": lambda d, t: (save_file(t, d / "model.safetensors"), (d / "pytorch_model.bin").touch())[1],
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_file_layout_gives_the_same_model(checkpoint: Path, writer: str) -> None:
    WRITERS[writer](checkpoint, {k: v.half() for k, v in TENSORS.items()})
    model = ChatGLMReader().read_model(checkpoint, torch.float32)
    expected = ChatGLMReader().read_model(DATA / "chatglm2", None).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    stored = ChatGLMReader().read_model(checkpoint, None)
    assert {p.dtype for p in stored.parameters()} == {torch.float16}
    assert stored.config.dtype == torch.float16
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))


def test_glm_tensors_are_renamed_and_split() -> None:
    model = ChatGLMReader().read_model(DATA / "chatglm2", None)
    fused = TENSORS["transformer.encoder.layers.1.self_attention.query_key_value.bias"]
    attention = model.model.layers[1].self_attn
    assert torch.equal(torch.cat([attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias]), fused)
    assert (model.config.head_dim, model.config.num_key_value_heads) == (16, 2)
    storages = {p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in model.parameters()}
    assert storages == {True}, "a parameter keeps a larger tensor in memory"


def test_rope_ratio_and_generation_config_are_taken_over(tmp_path: Path) -> None:
    shutil.copytree(DATA / "chatglm3", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"rope_ratio": 500}))
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.8}))
    model = ChatGLMReader().read_model(tmp_path / "m", None)
    assert model.config.rope_parameters["rope_theta"] == 5_000_000
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.5
    assert model.generation_config.eos_token_id == [2, 7]


def test_chatglm2_with_long_context_divides_positions(tmp_path: Path) -> None:
    """Position interpolation: token 3r has the position of token 3 of the short model."""
    shutil.copytree(DATA / "chatglm2", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"rope_ratio": 4}))
    train_sentencepiece(tmp_path / "m" / "tokenizer", "bpe", [])
    long, short = (ChatGLMReader().read_model(d, None) for d in (tmp_path / "m", DATA / "chatglm2"))
    ids, positions = torch.tensor([[190, 192, 7, 8, 9]]), torch.arange(5)[None]
    with torch.no_grad():
        got = long(ids, position_ids=4 * positions).logits
        assert (got - short(ids, position_ids=positions).logits).abs().max() < 1e-5
        assert (got - long(ids, position_ids=positions).logits).abs().max() > 1e-3


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


Tensors = dict[str, torch.Tensor]


def missing_shard(directory: Path, tensors: Tensors) -> None:
    write_shards(directory, tensors, "bin")
    (directory / "pytorch_model-00002-of-00003.bin").unlink()


def truncated(directory: Path, tensors: Tensors, name: str) -> None:
    WRITERS["one .bin" if name.endswith(".bin") else "one safetensors"](directory, tensors)
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[: len(content) // 2])


def save_safe(directory: Path, tensors: Tensors) -> None:
    save_file(tensors, directory / "model.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path, Tensors], Any], str]] = {
    "no weights": (lambda d, t: None, "holds no weights"),
    "missing shard": (missing_shard, "lacks pytorch_model-00002-of-00003.bin, one of 3"),
    "truncated safetensors": (
        lambda d, t: truncated(d, t, "model.safetensors"), r"model\.safetensors is damaged"
    ),
    "truncated bin": (lambda d, t: truncated(d, t, "pytorch_model.bin"), r"model\.bin is damaged"),
    "code": (
        lambda d, t: (d / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Code(d / "ran")})),
        "holds pickled code, which is never run",
    ),
    "code in a zip": (
        lambda d, t: torch.save({"lm_head.weight": Code(d / "ran")}, d / "pytorch_model.bin"),
        "holds pickled code, which is never run",
    ),
    "no dictionary": (lambda d, t: torch.save([1, 2], d / "pytorch_model.bin"), "is damaged"),
    "missing tensor": (
        lambda d, t: save_safe(d, dict(list(t.items())[1:])), "Missing key"
    ),
    "unknown tensor": (
        lambda d, t: save_safe(d, {**t, "transformer.prefix_encoder.weight": torch.ones(2)}),
        "Unexpected key",
    ),
    "misshapen tensor": (
        lambda d, t: save_safe(d, {k: v[:-1].clone() if "final_layernorm" in k else v for k, v in t.items()}),
        "size mismatch for",
    ),
    "damaged index": (
        lambda d, t: (d / "pytorch_model.bin.index.json").write_text("{"), r"index\.json cannot be read"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_line(checkpoint: Path, what: str) -> None:
    damage, message = DAMAGE[what]
    damage(checkpoint, TENSORS)
    with pytest.raises(LlmprunerError, match=message) as caught:
        ChatGLMReader().read_model(checkpoint, None)
    assert "\n" not in str(caught.value)
    assert not (checkpoint / "ran").exists()


@pytest.mark.parametrize(
    ("folder", "change", "message"),
    [
        ("chatglm_v1", {"quantization_bit": 4}, "quantized to 4 bits"),
        ("chatglm_v1", {"pre_seq_len": 128}, "P-tuning prefix"),
        ("chatglm_v1", {"position_encoding_2d": False}, "without 2D position encoding"),
        ("chatglm2", {"quantization_bit": 8}, "quantization_bit is 8"),
        ("chatglm2", {"add_bias_linear": True}, "add_bias_linear"),
        ("chatglm2", {"rmsnorm": False}, "rmsnorm is False"),
        ("chatglm2", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ("chatglm2", {"num_layers": "many"}, "config.json: .*'num_hidden_layers'"),
    ],
)
def test_variants_that_cannot_be_read_exactly_are_refused(
    folder: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = json.loads((DATA / folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message) as caught:
        llmpruner.discover(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_ice_text_is_one_line(tmp_path: Path) -> None:
    shutil.copytree(DATA / "chatglm_v1", tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    (tmp_path / "m" / "ice_text.model").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="cannot load model") as caught:
        llmpruner.load(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_later_generations_are_refused_by_the_class_of_the_first() -> None:
    ChatGLMFamily().register_models()
    with pytest.raises(Exception, match="ChatGLM2, ChatGLM3 or GLM-4"):
        AutoConfig.from_pretrained(DATA / "chatglm2")
