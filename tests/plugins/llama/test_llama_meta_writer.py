"""Pruned models back in Meta's format: what fits is the same model, what does not is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_cases import DATA, MODELS, TOKENIZER, copy_of, logits, read, set_param, tokens_of, write
from llmpruner_llama import LlamaFamily, MetaReader
from llmpruner_llama.meta_format import ffn_width

from llmpruner import UnsupportedModelError, build_graph
from llmpruner.models.surgery import cut
from llmpruner.structure.kept import Kept


def pruned(name: str, kept: Kept) -> Any:
    model = read(DATA / name / "1shard")
    family = LlamaFamily()
    cut(model, build_graph(family, model.config), kept, family)
    return model


def mlp(name: str, width: int) -> Kept:
    """The last ``width`` channels of every MLP."""
    full = 128 if name == "mha" else 224
    return {f"layers.{n}.mlp": list(range(full - width, full)) for n in range(2)}


FITTING = [
    ("mha", mlp("mha", 90), 2),
    ("mha", mlp("mha", 97), 1),
    ("mha", {"layers": [1]}, 2),
    ("gqa", mlp("gqa", 130), 2),
    ("gqa", {**mlp("gqa", 64), "layers": [0]}, 1),
    ("gqa", {}, 4),
]


@pytest.mark.parametrize(("name", "kept", "shards"), FITTING)
def test_written_back_and_read_again(name: str, kept: Kept, shards: int, tmp_path: Path) -> None:
    model = pruned(name, kept)
    expected = logits(model, tokens_of(name))
    write(model, None, tmp_path / "meta", shards=shards)
    again = read(tmp_path / "meta")
    assert len(list((tmp_path / "meta").glob("consolidated.*.pth"))) == shards
    assert torch.equal(logits(again, tokens_of(name)), expected)
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    width = model.model.layers[0].mlp.up_proj.out_features
    assert ffn_width(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier")) == width
    assert ("n_kv_heads" in params) == (name == "gqa")


@pytest.mark.parametrize("name", MODELS)
def test_an_untouched_model_is_the_original_file(name: str, tmp_path: Path) -> None:
    model = MetaReader().read_model(DATA / name / "1shard", None)
    write(model, None, tmp_path / "meta", shards=2)
    for number in range(2):
        file = f"consolidated.{number:02}.pth"
        ours = torch.load(tmp_path / "meta" / file, weights_only=True)
        theirs = torch.load(DATA / name / "2shards" / file, weights_only=True)
        assert ours.keys() == theirs.keys() - {"rope.freqs"}
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert all(ours[key].dtype == theirs[key].dtype for key in ours)
        # A view would have brought its whole storage along.
        sizes = [(folder / file).stat().st_size for folder in (tmp_path / "meta", DATA / name / "2shards")]
        assert abs(sizes[0] - sizes[1]) < 2000


def test_every_width_has_a_multiplier() -> None:
    for dim in (48, 64, 2048, 4096, 5120, 8192):
        whole = ffn_width(dim, 1, None)
        for width in {1, 2, 3, whole // 3, whole - 1, whole, whole + 1, 3 * dim + 1}:
            assert ffn_width(dim, 1, (width + 0.5) / whole) == width


def test_widths_of_the_releases() -> None:
    assert ffn_width(4096, 256, None) == 11008  # LLaMA-7B
    assert ffn_width(8192, 4096, 1.3) == 28672  # Llama-2-70B
    assert ffn_width(4096, 1024, 1.3) == 14336  # Llama-3-8B


def test_scaled_rope_and_base_survive(tmp_path: Path) -> None:
    folder = copy_of("gqa", "1shard", tmp_path / "in")
    set_param(folder, rope_theta=500000.0, use_scaled_rope=True)
    model = read(folder)
    write(model, None, tmp_path / "out")
    again = read(tmp_path / "out")
    assert again.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(logits(again, tokens_of("gqa")), logits(model, tokens_of("gqa")))


@pytest.mark.parametrize(
    ("values", "tiktoken", "axis"),
    [
        ({}, False, 1),
        ({"rope_theta": 1e6}, False, 1),
        ({"rope_theta": 5e5}, False, 0),
        ({"rope_theta": 5e5, "use_scaled_rope": True}, False, 0),
        ({"use_scaled_rope": True}, False, 0),
        ({}, True, 0),
    ],
    ids=["Llama 1 and 2", "Code Llama", "Llama 3", "Llama 3.1", "scaled", "tiktoken"],
)
def test_the_embedding_is_split_as_the_code_of_its_release_reads_it(
    values: dict[str, Any], tiktoken: bool, axis: int, tmp_path: Path
) -> None:
    folder = copy_of("gqa", "1shard", tmp_path / "in")
    set_param(folder, **values)
    model = read(folder)
    (tmp_path / "tokenizer.model").write_bytes(base64.b64encode(b"a") + b" 0\n")
    write(model, tmp_path / "tokenizer.model" if tiktoken else TOKENIZER, tmp_path / "out", shards=2)
    whole = model.model.embed_tokens.weight
    for number, part in enumerate(whole.chunk(2, axis)):
        state = torch.load(tmp_path / "out" / f"consolidated.{number:02}.pth", weights_only=True)
        assert torch.equal(state["tok_embeddings.weight"], part)
    (tmp_path / "out" / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.model").unlink()
    assert torch.equal(logits(read(tmp_path / "out"), tokens_of("gqa")), logits(model, tokens_of("gqa")))


def test_a_tied_head_is_written_out(tmp_path: Path) -> None:
    model = read(DATA / "mha" / "1shard")
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    write(model, None, tmp_path / "meta", shards=2)
    again = read(tmp_path / "meta")
    assert torch.equal(again.lm_head.weight, model.model.embed_tokens.weight)
    assert torch.equal(logits(again, tokens_of("mha")), logits(model, tokens_of("mha")))


REFUSED: list[tuple[str, Kept, int, str]] = [
    ("mha", {f"layers.{n}.attention": [0, 1, 2] for n in range(2)}, 1, "heads were pruned .layer 0: 24 rows"),
    ("gqa", {"layers.1.attention": [0, 1]}, 1, "heads were pruned .layer 1: 32 rows in q_proj"),
    ("mha", {"layers.0.mlp": list(range(100))}, 1, "the same width, here they have 100 to 128; .*prune.unit_ratio"),
    ("mha", {"hidden": list(range(36))}, 1, r"hidden channels were pruned \(36 of 48"),
    ("mha", mlp("mha", 97), 2, "in 2 shards: .* MLP of width 97 must all divide"),
    ("gqa", {}, 8, "in 8 shards: 4 KV heads"),
]


@pytest.mark.parametrize(("name", "kept", "shards", "reason"), REFUSED)
def test_refused_with_the_reason(name: str, kept: Kept, shards: int, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        write(pruned(name, kept), None, tmp_path / "meta", shards=shards)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_other_rotary_scaling_is_refused(tmp_path: Path) -> None:
    model = read(DATA / "mha" / "1shard")
    model.config.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="rotary scaling of type 'linear'"):
        write(model, None, tmp_path / "meta")
