"""The command line in-process, and tiny models on disk."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models

import llmpruner
from llmpruner.cli import console, main

TEXT = (
    "The quick brown fox jumps over the lazy dog. A model predicts the next token from those before it. "
    "Paris is the capital of France, and Rome is the capital of Italy. Two and two make four.\n"
) * 20
INSTRUCTIONS = [
    {"instruction": "Name the capital of France.", "input": "", "output": "Paris."},
    {"instruction": "Add the numbers.", "input": "2 and 2", "output": "Four."},
    {"instruction": "What does the fox do?", "output": "It jumps over the dog."},
    {"instruction": "Name the capital of Italy.", "output": "Rome."},
]


@dataclass(frozen=True)
class Outcome:
    """How one run of the command line ended. ``code``: the exit code."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``run("plan", model, …)``: `main` with these arguments, as the console script calls it."""
    for terminal in (console.out, console.err):
        monkeypatch.setattr(terminal, "width", 300)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["llmpruner", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        code = exit.value.code
        return Outcome(code if isinstance(code, int) else int(code is not None), *capsys.readouterr())

    return run


@pytest.fixture
def refused(run, shared, tmp_path) -> Callable[..., str]:
    """``refused("plan", …)``: run a command that is a mistake, in which ``{models}`` and ``{tmp}`` are folders; returns
    the message. Exit code 2, one line, nothing written, and no weights read unless ``read``."""

    def refused(*arguments: object, read: bool = False) -> str:
        places = {"models": shared, "tmp": tmp_path}
        filled = [str(a).format(**places) if isinstance(a, str) else a for a in arguments]
        before = listing(tmp_path), listing(shared)
        result = run(*filled)
        assert (listing(tmp_path), listing(shared)) == before
        assert (result.code, result.out) == (2, ""), result.err
        lines = [line for line in result.err.splitlines() if line.strip() and not line.startswith("•")]
        assert len(lines) == 1 and lines[0].startswith("error: "), result.err
        assert read or "• loading" not in result.err
        return lines[0].removeprefix("error: ")

    return refused


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests read and never write: models ``dense``, ``other`` (wider), ``bare`` (no tokenizer), ``nan`` and
    ``packed`` (says that it is quantised), ``text.txt``, ``empty.txt``, ``data.jsonl``. Four layers of 2 KV heads with
    2 query heads each; 30,976 decoder parameters of 50,208."""
    folder = tmp_path_factory.mktemp("shared")
    tokenizer = tiny_models.tokenizer(TEXT)
    for name, width in (("dense", 48), ("other", 40), ("bare", 48), ("nan", 48)):
        model = tiny_models.llama(layers=4, intermediate_size=width, initializer_range=0.2)
        if name == "nan":
            model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
        model.save_pretrained(folder / name)
        if name != "bare":
            tokenizer.save_pretrained(folder / name)
    shutil.copytree(folder / "dense", folder / "packed")
    config = json.loads((folder / "packed" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "packed" / "config.json").write_text(json.dumps(config))
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "empty.txt").write_text(" \n")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in INSTRUCTIONS), encoding="utf-8")
    return folder


@pytest.fixture
def dense(shared: Path) -> Path:
    return shared / "dense"


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    """A model whose layers differ: layers 1 and 2 lost a quarter of their MLP channels."""
    folder = tmp_path_factory.mktemp("pruned") / "model"
    model = llmpruner.prune(shared / "dense", unit_ratio=0.25, layers=[1, 2], importance="l1", output=folder)
    assert model.form == "shim"
    return folder
