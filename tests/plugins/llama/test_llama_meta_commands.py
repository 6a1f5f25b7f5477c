"""A folder in Meta's format at the command line: export in both directions, pruning with and without a tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from llama_cases import DATA, TOKENIZER, copy_of, logits, read, tokens_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmpruner.cli import main


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
    assert run("export", folder, "--to", "stock", "-o", tmp_path / "hf")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    expected = load_file(DATA / "gqa" / "cases.safetensors")["logits_full"]
    assert (logits(model, tokens_of("gqa")) - expected).abs().max() <= 2e-5
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hf")) == 84
    assert run("export", tmp_path / "hf", "-o", tmp_path / "back", "--to", "meta", "--set", "meta.shards=2")[0] == 0
    assert torch.equal(logits(read(tmp_path / "back"), tokens_of("gqa")), logits(model, tokens_of("gqa")))
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


def test_pruning_a_folder_without_a_tokenizer(run: Run, tmp_path: Path) -> None:
    """One clear line, unless the user says that there is none; a tokenizer beside the folder counts."""
    folder = copy_of("mha", "2shards", tmp_path / "llama" / "7B")
    command = ("prune", folder, "--ratio", 0.1, "--set", "prune.layers=all", "--importance", "l1")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*command, "-o", tmp_path / "out")
    assert (code, out, sorted(tmp_path.rglob("*"))) == (2, "", before)
    (line,) = (line for line in err.replace("\n", " ").split("•") if "error:" in line)
    assert f"{folder}' brings no tokenizer" in line and "--no-tokenizer" in line
    assert run(*command, "-o", tmp_path / "weights")[0] == 0
    assert not list((tmp_path / "weights").glob("tokenizer*"))
    shutil.copyfile(TOKENIZER, folder.parent / "tokenizer.model")
    assert run(*command, "-o", tmp_path / "whole")[0] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "whole")("Hello")["input_ids"]


def test_uneven_layers_do_not_go_back_to_meta(run: Run, tmp_path: Path) -> None:
    folder = copy_of("mha", "1shard", tmp_path / "7B", tokenizer=True)
    assert (
        run("prune", folder, "--ratio", 0.2, "--set", "prune.layers=1", "--importance", "l1", "-o", tmp_path / "out")[0]
        == 0
    )
    code, _, err = run("export", tmp_path / "out", "--to", "meta", "-o", tmp_path / "back")
    assert code == 2 and "--unit-ratio with --layers all" in " ".join(err.split())
    assert not (tmp_path / "back").exists()
