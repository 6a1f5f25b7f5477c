"""Official delta weights: bit for bit what FastChat's apply_delta gives, or one line that says why not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmpruner_vicuna.delta import apply_delta
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmpruner import CheckpointError, LlmprunerError, ModelError, OutputError, load_catalog
from llmpruner.cli import main
from llmpruner.discovery.opening import family_for

DATA = Path(__file__).parents[2] / "data" / "vicuna"
VERSIONS = {"delta_v0": "vicuna-v0", "delta_v1": "vicuna"}


def same_bits(folder: Path, version: str) -> bool:
    one, other = (load_file(f) for f in (folder / "model.safetensors", DATA / version / "expected.safetensors"))
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k].view(torch.int16), other[k].view(torch.int16))
        for k in one
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_the_sum_is_bit_identical_with_configuration_and_tokenizer_of_the_delta(version: str, tmp_path: Path) -> None:
    apply_delta(DATA / version / "base", DATA / version / "delta", tmp_path / "sum")
    assert same_bits(tmp_path / "sum", version)
    assert [p.name for p in tmp_path.iterdir()] == ["sum"]
    expected = load_file(DATA / version / "logits.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sum", dtype=torch.float32)
    with torch.no_grad():
        logits = model(expected["input_ids"].long()).logits
    assert (logits - expected["logits_fp32"]).abs().max() <= 2e-5
    ours, theirs = (AutoTokenizer.from_pretrained(p) for p in (tmp_path / "sum", DATA / version / "delta"))
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.pad_token == "[PAD]") == (version == "delta_v0")
    assert ours("hi there</s>")["input_ids"] == theirs("hi there</s>")["input_ids"]
    config = AutoConfig.from_pretrained(tmp_path / "sum")
    assert config.vocab_size == len(ours)
    assert config.dtype == torch.float16
    generation = json.loads((tmp_path / "sum" / "generation_config.json").read_text())
    assert generation == json.loads((DATA / version / "delta" / "generation_config.json").read_text())
    catalog = load_catalog()
    assert family_for(catalog, config).name == VERSIONS[version]
    assert family_for(catalog, AutoConfig.from_pretrained(DATA / version / "base")).name == "llama"


def edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path, Path], None]:
    def damage(_: Path, delta: Path) -> None:
        state = torch.load(delta / "pytorch_model.bin", weights_only=True)
        change(state)
        torch.save(state, delta / "pytorch_model.bin")

    return damage


def set_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


DAMAGE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "a shard of the base is missing": (
        lambda b, d: (b / "pytorch_model-00002-of-00002.bin").unlink(), r"/base' .*pytorch_model-00002-of-00002\.bin"
    ),
    "the delta is truncated": (
        lambda b, d: os.truncate(d / "pytorch_model.bin", 9000), r"cannot load model '.*/delta' \("
    ),
    "the base is no LLaMA": (lambda b, d: set_config(b, model_type="gpt2"), r"'.*/base' lacks tensor 'transformer\."),
    "another depth": (
        edit(lambda s: s.pop("model.layers.1.mlp.up_proj.weight")),
        r"'.*/delta' lacks tensor 'model\.layers\.1\.mlp\.up_proj\.weight'",
    ),
    "another width": (
        edit(lambda s: s.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(40, 32, dtype=torch.float16)})),
        r"'.*/delta' has in another shape .* 'model\.layers\.0\.mlp\.up_proj\.weight'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_line_and_nothing_is_written(what: str, tmp_path: Path) -> None:
    base, delta = (shutil.copytree(DATA / "delta_v0" / p, tmp_path / "in" / p) for p in ("base", "delta"))
    damage, message = DAMAGE[what]
    damage(base, delta)
    with pytest.raises(LlmprunerError, match=message) as caught:
        apply_delta(base, delta, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_the_deltas_of_the_two_releases_are_not_interchangeable(tmp_path: Path) -> None:
    for base, delta in (("delta_v0", "delta_v1"), ("delta_v1", "delta_v0")):
        with pytest.raises(CheckpointError, match="is no delta for"):
            apply_delta(DATA / base / "base", DATA / delta / "delta", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_delta_on_the_hub_is_to_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hf download REPO"):
        apply_delta(DATA / "delta_v0" / "base", Path("lmsys/vicuna-7b-delta-v1.1"), tmp_path / "out")


def test_an_output_that_exists_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmpruner_vicuna.delta.load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(OutputError, match="exists already"):
        apply_delta(DATA / "delta_v0" / "base", DATA / "delta_v0" / "delta", tmp_path)


def test_at_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = DATA / "delta_v0"
    command = ["apply-delta", folder / "base", folder / "delta", "-o", tmp_path / "sum"]
    monkeypatch.setattr("sys.argv", ["llmpruner", *map(str, command)])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code and same_bits(tmp_path / "sum", "delta_v0")
