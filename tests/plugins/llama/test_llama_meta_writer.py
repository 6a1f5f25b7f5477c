"""Pruned models back in Meta's format: what fits is the same model, what does not is refused; and the exporter."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llama_cases import DATA, MODELS, TOKENIZER, copy_of, logits, read, set_param, tokens_of, write
from llmpruner_llama import LlamaFamily, MetaExporter, MetaReader, meta_format
from llmpruner_llama.meta_format import ffn_width, to_rotate_half
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from llmpruner import CheckpointError, UnsupportedModelError, build_graph, exporters, load_pruned, save_checkpoint
from llmpruner.cli.app import build_app
from llmpruner.discovery.cut import cut
from llmpruner.errors import SettingsError
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


RELEASES: dict[str, tuple[dict[str, Any], int]] = {
    "Llama 1 and 2": ({}, 1),
    "Code Llama": ({"rope_theta": 1e6}, 1),
    "Llama 3": ({"rope_theta": 5e5}, 0),
    "Llama 3.1": ({"rope_theta": 5e5, "use_scaled_rope": True}, 0),
    "scaled": ({"use_scaled_rope": True}, 0),
    "tiktoken": ({}, 0),
}


@pytest.mark.parametrize("release", RELEASES)
def test_the_embedding_is_split_as_the_code_of_its_release_reads_it(release: str, tmp_path: Path) -> None:
    values, axis = RELEASES[release]
    folder = copy_of("gqa", "1shard", tmp_path / "in")
    set_param(folder, **values)
    model = read(folder)
    (tmp_path / "tokenizer.model").write_bytes(base64.b64encode(b"a") + b" 0\n")
    tokenizer = tmp_path / "tokenizer.model" if release == "tiktoken" else TOKENIZER
    write(model, tokenizer, tmp_path / "out", shards=2)
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
    ("mha", {f"layers.{n}.attention": [0, 1, 2] for n in range(2)}, 1, r"were pruned \(layer 0: \(24, 48\)"),
    ("gqa", {"layers.1.attention": [0, 1]}, 1, r"were pruned \(layer 1: \(32, 64\) in q_proj"),
    ("mha", {"layers.0.mlp": list(range(100))}, 1, "the same width, here they have 100 to 128; .*prune.unit_ratio"),
    ("mha", {"hidden": list(range(36))}, 1, r"hidden channels were pruned \(layer 0: \(48, 36\)"),
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


# The exporter


def export(source: Path, output: Path, **settings: Any) -> str:
    def load() -> Any:
        return SimpleNamespace(network=load_pruned(source), tokenizer=None, record=None)

    return exporters.export(source, MetaExporter(**settings), output, load)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(pruned("gqa", mlp("gqa", 130)), tmp_path / "pruned", record={}, family=LlamaFamily())
    return tmp_path / "pruned"


def test_a_vocabulary_that_lost_tokens_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    source = tmp_path / "pruned"
    source.mkdir()
    (source / "llmpruner.json").write_text('{"plans": [{"cuts": {"vocabulary": {}}}]}')
    with pytest.raises(UnsupportedModelError, match="tokens were removed"):
        exporters.export(source, MetaExporter(), tmp_path / "meta", lambda: pytest.fail("loaded"))
    assert not (tmp_path / "meta").exists()


@pytest.mark.parametrize("factor", [None, 8.0, 32.0])
def test_another_rotary_factor_than_that_of_metas_code_is_said(factor: float | None, tmp_path: Path) -> None:
    folder = copy_of("gqa", "1shard", tmp_path / "source")
    if factor is not None:
        set_param(folder, rope_theta=500000.0, use_scaled_rope=True, rope_scaling_factor=factor)
    save_checkpoint(read(folder), tmp_path / "hf", record={}, family=LlamaFamily())
    line = export(tmp_path / "hf", tmp_path / "meta")
    assert ("its rotary factor is 32, and Meta's code takes 8" in line) == (factor == 32.0)
    if factor is not None:
        assert MetaReader().read_config(tmp_path / "meta").rope_parameters["factor"] == factor


def test_the_tokenizer_comes_from_the_source_or_from_the_folder_given(saved: Path, tmp_path: Path) -> None:
    export(saved, tmp_path / "named", tokenizer=TOKENIZER)
    shutil.copy(TOKENIZER, saved)
    assert "without" not in export(saved, tmp_path / "own")
    for folder in ("named", "own"):
        assert len(MetaReader().read_tokenizer(tmp_path / folder)) == 84
    with pytest.raises(SettingsError, match=r"exporter meta: tokenizer .*nowhere"):
        MetaExporter(tokenizer=tmp_path / "nowhere")


def test_the_tokenizer_of_a_hub_model_comes_from_the_cache(saved: Path, tmp_path: Path) -> None:
    def load() -> Any:
        return SimpleNamespace(network=load_pruned(saved), tokenizer=SimpleNamespace(vocab_file=str(TOKENIZER)))

    assert "without" not in exporters.export(Path("meta-llama/some"), MetaExporter(), tmp_path / "meta", load)
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


def test_a_wrong_order_of_rotary_dimensions_is_noticed(saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(meta_format, "to_neighbours", to_rotate_half)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is read back with other values"):
        export(saved, tmp_path / "meta")
    assert not (tmp_path / "meta").exists()


def run(*arguments: Any) -> None:
    assert CliRunner().invoke(build_app(), list(map(str, arguments))).exit_code == 0


def test_meta_to_hugging_face_and_back_at_the_command_line(tmp_path: Path) -> None:
    folder = copy_of("gqa", "2shards", tmp_path / "meta", tokenizer=True)
    run("export", folder, "--to", "stock", "-o", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hf")) == 84
    run("export", tmp_path / "hf", "-o", tmp_path / "back", "--to", "meta", "--set", "meta.shards=2")
    assert torch.equal(logits(read(tmp_path / "back"), tokens_of("gqa")), logits(model, tokens_of("gqa")))
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


def test_a_folder_is_pruned_without_a_tokenizer_or_with_one_beside_it(tmp_path: Path) -> None:
    folder = copy_of("mha", "2shards", tmp_path / "llama" / "7B")
    command = ("prune", folder, "--ratio", 0.1, "--set", "prune.layers=all", "--importance", "l1")
    run(*command, "-o", tmp_path / "weights")
    assert not list((tmp_path / "weights").glob("tokenizer*"))
    shutil.copyfile(TOKENIZER, folder.parent / "tokenizer.model")
    run(*command, "-o", tmp_path / "whole")
    assert AutoTokenizer.from_pretrained(tmp_path / "whole")("Hello")["input_ids"]
