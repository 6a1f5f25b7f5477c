"""``llmpruner convert``, as a user calls it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from llama_cases import DATA, TOKENIZER, copy_of, logits, read, set_param, tokens_of
from llmpruner_llama.deltas import DeltaFamily, delta_family
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmpruner import Catalog, ModelFamily, PluginError, UnknownNameError, hookimpl, plugin_manager
from llmpruner.cli import main

VICUNA = DATA.parent / "vicuna"


class Run:
    """Runs the command line; gives its exit code, output and error output."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self._monkeypatch.setattr("sys.argv", ["llmpruner", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        code = exit.value.code
        return (code if isinstance(code, int) else 0, *self._capsys.readouterr())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capsys)


def test_meta_to_hugging_face_and_back(run: Run, tmp_path: Path) -> None:
    folder = copy_of("gqa", "2shards", tmp_path / "meta", tokenizer=True)
    assert run("convert", folder, "-o", tmp_path / "hf")[:2] == (0, f"wrote {tmp_path / 'hf'}\n")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    expected = load_file(DATA / "gqa" / "cases.safetensors")["logits_full"]
    assert (logits(model, tokens_of("gqa")) - expected).abs().max() <= 2e-5
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hf")) == 84
    assert run("convert", tmp_path / "hf", "-o", tmp_path / "back", "--to", "meta", "--shards", 2)[0] == 0
    assert torch.equal(logits(read(tmp_path / "back"), tokens_of("gqa")), logits(model, tokens_of("gqa")))
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


def test_what_metas_format_loses_is_noted(run: Run, tmp_path: Path) -> None:
    folder = copy_of("gqa", "1shard", tmp_path / "meta")
    set_param(folder, max_seq_len=77)
    assert run("convert", folder, "-o", tmp_path / "hf", "--no-tokenizer")[0] == 0
    code, _, noted = run("convert", tmp_path / "hf", "-o", tmp_path / "back", "--to", "meta", "--no-tokenizer")
    assert code == 0 and "note: its context of 77 tokens is not stored" in noted


def test_weights_alone_in_another_type(run: Run, tmp_path: Path) -> None:
    source = DATA / "mha" / "1shard"
    assert run("convert", source, "-o", tmp_path / "hf", "--no-tokenizer", "--dtype", "bfloat16")[0] == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16


@pytest.mark.parametrize("version", ["delta_v0", "delta_v1"])
def test_delta(run: Run, version: str, tmp_path: Path) -> None:
    base, delta = VICUNA / version / "base", VICUNA / version / "delta"
    assert run("convert", "--base", base, "--delta", delta, "-o", tmp_path / "sum")[0] == 0
    ours = load_file(tmp_path / "sum" / "model.safetensors")
    expected = load_file(VICUNA / version / "expected.safetensors")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


BASE, DELTA = VICUNA / "delta_v0" / "base", VICUNA / "delta_v0" / "delta"
MISTAKES: dict[str, tuple[tuple[object, ...], str]] = {
    "nothing": ((), "give either a SOURCE"),
    "a base alone": (("--base", BASE), "give either a SOURCE"),
    "everything": ((BASE, "--base", BASE, "--delta", DELTA), "give either a SOURCE"),
    "no such folder": (("nowhere",), "model directory 'nowhere' does not exist"),
    "no model": ((VICUNA,), "has no params.json"),
    "no tokenizer": ((DATA / "mha" / "1shard",), "--no-tokenizer"),
    "Hugging Face already": ((BASE,), "is in Hugging Face's format already"),
    "Meta already": ((DATA / "mha" / "1shard", "--to", "meta"), "is in Meta's format already"),
    "no model to Meta": ((VICUNA, "--to", "meta"), "it has no config.json"),
    "type to Meta": ((BASE, "--to", "meta", "--dtype", "float32"), "leave --dtype out"),
    "delta to Meta": (("--base", BASE, "--delta", DELTA, "--to", "meta"), "convert the result with --to meta"),
    "delta for another base": (("--base", VICUNA / "delta_v1" / "base", "--delta", DELTA), "is no delta for"),
    "delta of a family without": (("--base", BASE, "--delta", DELTA, "--family", "llama"), "unknown family with delta"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_one_line(run: Run, what: str, tmp_path: Path) -> None:
    arguments, message = MISTAKES[what]
    code, output, error = run("convert", *arguments, "-o", tmp_path / "out")
    assert (code, output) == (2, "")
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_vicuna_no_one_applies_deltas(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPRUNER_BLOCK", "vicuna")
    code, _, error = run("convert", "--base", BASE, "--delta", DELTA, "-o", tmp_path / "out")
    assert code == 2
    assert "no installed plugin applies delta weights" in error


class Alpaca(ModelFamily, DeltaFamily):
    name = "alpaca"

    def apply_delta(self, base: Path, delta: Path, target: Path, dtype: torch.dtype | None = None) -> None:
        shutil.copytree(delta, target)


class AlpacaPlugin:
    @hookimpl
    def llmpruner_model_families(self) -> list[type]:
        return [Alpaca]


def test_another_family_with_deltas_has_to_be_chosen(tmp_path: Path) -> None:
    manager = plugin_manager()
    manager.register(AlpacaPlugin(), "alpaca")
    catalog = Catalog(manager)
    with pytest.raises(PluginError, match="alpaca, vicuna; choose one with --family"):
        delta_family(catalog, None)
    with pytest.raises(UnknownNameError, match="did you mean alpaca"):
        delta_family(catalog, "alpac")
    delta_family(catalog, "alpaca").apply_delta(BASE, DELTA, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert type(delta_family(catalog, "vicuna-v0")).__name__ == "VicunaV0Family"


def test_pruning_a_folder_without_a_tokenizer(run: Run, tmp_path: Path) -> None:
    """One clear line, unless the user says that there is none; a tokenizer beside the folder counts."""
    folder = copy_of("mha", "2shards", tmp_path / "llama" / "7B")
    command = ("prune", folder, "--ratio", 0.1, "--layers", "all", "--importance", "l1")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*command, "-o", tmp_path / "out")
    assert (code, out, sorted(tmp_path.rglob("*"))) == (2, "", before)
    (line,) = (line for line in err.replace("\n", " ").split("•") if "error:" in line)
    assert f"{folder}' brings no tokenizer" in line and "--no-tokenizer" in line
    assert run(*command, "--no-tokenizer", "-o", tmp_path / "weights")[0] == 0
    assert not list((tmp_path / "weights").glob("tokenizer*"))
    shutil.copyfile(TOKENIZER, folder.parent / "tokenizer.model")
    assert run(*command, "-o", tmp_path / "whole")[0] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "whole")("Hello")["input_ids"]


def test_uneven_layers_do_not_go_back_to_meta(run: Run, tmp_path: Path) -> None:
    folder = copy_of("mha", "1shard", tmp_path / "7B", tokenizer=True)
    assert run("prune", folder, "--ratio", 0.2, "--layers", "1", "--importance", "l1", "-o", tmp_path / "out")[0] == 0
    code, _, err = run("convert", tmp_path / "out", "--to", "meta", "-o", tmp_path / "back")
    assert code == 2 and "--unit-ratio with --layers all" in " ".join(err.split())
    assert not (tmp_path / "back").exists()
