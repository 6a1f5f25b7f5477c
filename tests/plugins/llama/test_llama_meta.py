"""Meta's format, read and written: against the outputs of meta-llama/llama's model.py, and what a user can get wrong.
Pruned models that fit are written as the same model; the rest is refused."""

from __future__ import annotations

import base64
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llama_cases import DATA, LAYOUTS, MODELS, TOKENIZER, copy_of, logits, read, resave, set_param, tokens_of, write
from llmpruner_llama import LlamaFamily, MetaExporter, MetaReader, meta_format
from llmpruner_llama.meta_format import MetaParams, ffn_width, to_rotate_half
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import llmpruner
from llmpruner import CheckpointError, UnsupportedModelError, build_graph, exporters, load_pruned, save_checkpoint
from llmpruner.cli.app import build_app
from llmpruner.discovery.cut import cut
from llmpruner.errors import SettingsError
from llmpruner.structure.kept import Kept

TOLERANCE = 2e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_with_and_without_cache_and_greedy_tokens(name: str, layout: str) -> None:
    cases = load_file(DATA / name / "cases.safetensors")
    prefill = json.loads((DATA / name / "cases.json").read_text())["prefill_then_steps_from"]
    tokens = cases["tokens"].long()
    model = read(DATA / name / layout)
    with torch.no_grad():
        full = model(tokens).logits
        step = model(tokens[:, :prefill], use_cache=True)
        steps = [step.logits]
        for n in range(prefill, tokens.shape[1]):
            step = model(tokens[:, n : n + 1], past_key_values=step.past_key_values, use_cache=True)
            steps.append(step.logits)
        new = model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert (full - cases["logits_full"]).abs().max() <= TOLERANCE
    assert (torch.cat(steps, 1) - cases["logits_incremental"]).abs().max() <= TOLERANCE
    assert torch.equal(new[:, tokens.shape[1] :], cases["greedy_new_tokens"].long())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_conversion_is_what_the_reader_reads_in_the_stored_type(name: str, layout: str, tmp_path: Path) -> None:
    llmpruner.export(DATA / name / layout, to="stock", output=tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    expected = MetaReader().read_model(DATA / name / layout, None)
    stored = torch.float16 if name == "mha" else torch.bfloat16
    assert model.dtype == expected.dtype == stored
    ours, theirs = (m.config.to_diff_dict() for m in (model, expected))
    assert {key: ours.get(key) for key in theirs} == theirs
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("dim", "factor"),
    [(2048, 32.0), (3072, 32.0), (4096, 8.0), (8192, 8.0), (16384, 8.0)],
    ids=["3.2-1B", "3.2-3B", "3.1-8B", "3.3-70B", "3.1-405B"],
)
def test_the_factor_of_scaled_rope_follows_the_release(dim: int, factor: float, tmp_path: Path) -> None:
    file = tmp_path / "params.json"
    values = {"dim": dim, "n_layers": 2, "n_heads": 16, "rope_theta": 500000.0, "use_scaled_rope": True}
    file.write_text(json.dumps(values))
    params = MetaParams.read(file)
    assert params.rope_scaling_factor == factor and "rope_scaling_factor" not in params.to_json()
    for other in (8.0, 32.0, 16.0):
        written = params.model_copy(update={"rope_scaling_factor": other}).to_json()
        assert written.get("rope_scaling_factor") == (None if other == factor else other)
        file.write_text(json.dumps(written))
        assert MetaParams.read(file).rope_scaling_factor == other


def test_scaled_rope_becomes_llama3_scaling(tmp_path: Path) -> None:
    folder = copy_of("gqa", "1shard", tmp_path / "llama31")
    set_param(folder, rope_theta=500000.0, use_scaled_rope=True)
    model = read(folder)
    assert model.config.rope_parameters == {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert model.config.max_position_embeddings == 131072
    plain = read(DATA / "gqa" / "1shard")
    assert not torch.equal(logits(model, tokens_of("gqa")), logits(plain, tokens_of("gqa")))


@pytest.mark.parametrize(
    ("values", "positions"),
    [({}, 2048), ({"norm_eps": 1e-5}, 4096), ({"rope_theta": 5e5}, 8192), ({"rope_theta": 1e6}, 16384)],
)
def test_context_follows_the_release(values: dict[str, float], positions: int, tmp_path: Path) -> None:
    folder = copy_of("mha", "1shard", tmp_path / "meta")
    set_param(folder, **values)
    assert MetaReader().read_config(folder).max_position_embeddings == positions


def test_without_an_output_matrix_the_embedding_is_tied(tmp_path: Path) -> None:
    folder = copy_of("mha", "1shard", tmp_path / "tied")
    resave(folder, 0, lambda state: state.pop("output.weight"))
    model = read(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    llmpruner.export(folder, to="stock", output=tmp_path / "hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert torch.equal(again(tokens_of("mha")).logits, model(tokens_of("mha")).logits)


def test_recognises_meta_folders_only(tmp_path: Path) -> None:
    reader = MetaReader()
    assert reader.recognises(DATA / "mha" / "1shard")
    assert not reader.recognises(DATA / "mha")
    both = copy_of("mha", "1shard", tmp_path / "both")
    (both / "config.json").write_text("{}")
    assert not reader.recognises(both)


# Mistakes


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran-code",)


FIRST, SECOND = "consolidated.00.pth", "consolidated.01.pth"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "last shard missing": (lambda f: (f / SECOND).unlink(), r" a consolidated\.NN\.pth is missing"),
    "a shard too many": (lambda f: shutil.copy(f / SECOND, f / "consolidated.02.pth"), "has shape .* makes it"),
    "no params.json": (lambda f: (f / "params.json").unlink(), r"params\.json cannot be read"),
    "params.json is no JSON": (lambda f: (f / "params.json").write_text("{"), r"params\.json cannot be read"),
    "width of another model": (lambda f: set_param(f, multiple_of=100), r"\(128, 48\); .* makes it \(200, 48\)"),
    "fewer layers than weights": (lambda f: set_param(f, n_layers=1), r"layers\.1\.\S+, which no LLaMA"),
    "unknown tensor": (
        lambda f: resave(f, 0, lambda s: s.update({"layers.0.gate": s.pop("layers.0.attention_norm.weight")})),
        r"lacks layers\.0\.attention_norm\.weight",
    ),
    "truncated": (lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:-2000]), r"01\.pth is damaged, or"),
    "code inside": (lambda f: torch.save({"a": Code()}, f / FIRST), r"00\.pth is damaged, or holds pickled code"),
    "code in a bare pickle": (
        lambda f: (f / FIRST).write_bytes(pickle.dumps({"a": Code()})), r"00\.pth is damaged, or holds pickled code"
    ),
    "damaged tokenizer": (
        lambda f: (f / "tokenizer.model").write_bytes(b"\x00junk"), "neither a SentencePiece model nor a tiktoken file"
    ),
}  # fmt: skip


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


# Writing


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


def test_widths_of_the_releases_and_a_multiplier_for_every_width() -> None:
    for dim in (48, 64, 2048, 4096, 5120, 8192):
        whole = ffn_width(dim, 1, None)
        for width in {1, 2, 3, whole // 3, whole - 1, whole, whole + 1, 3 * dim + 1}:
            assert ffn_width(dim, 1, (width + 0.5) / whole) == width
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


def test_a_folder_is_pruned_without_a_tokenizer(tmp_path: Path) -> None:
    folder = copy_of("mha", "2shards", tmp_path / "llama")
    run("prune", folder, "--ratio", 0.1, "--set", "prune.layers=all", "--importance", "l1", "-o", tmp_path / "out")
    assert not list((tmp_path / "out").glob("tokenizer*"))
