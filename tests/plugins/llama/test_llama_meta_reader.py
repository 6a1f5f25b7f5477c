"""Meta's format read: against the outputs of meta-llama/llama's model.py, and what a user can get wrong."""

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
from llama_cases import DATA, LAYOUTS, MODELS, copy_of, logits, read, resave, set_param, tokens_of
from llmpruner_llama import MetaReader
from llmpruner_llama.meta_format import MetaParams
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llmpruner
from llmpruner import CheckpointError

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
