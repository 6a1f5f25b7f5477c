"""Every command in docs/models.md runs, in its order, on tiny checkpoints in the formats that it names."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from llama_cases import DATA, TOKENIZER, copy_of
from test_chatglm_pipeline import write_first_generation
from test_llama_convert_command import Run

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
DELTA = DATA.parent / "vicuna" / "delta_v1"
CONVERSATION = [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "I am a tiny model."}]
TINY = {
    "prune": ("--samples", "2", "--length", "8"),
    "recover": ("--max-steps", "1", "--batch-size", "2", "--micro-batch-size", "2"),
}


def commands() -> list[list[str]]:
    lines = [line for block in re.findall(r"^```\n(.*?)^```", DOCUMENT, re.S | re.M) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("llmpruner ")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    copy_of("mha", "2shards", tmp_path / "path" / "to" / "llama-7B", tokenizer=True)
    (tmp_path / "path" / "to" / "chatglm-6b").mkdir()
    write_first_generation(tmp_path / "path" / "to" / "chatglm-6b")
    shutil.copytree(DELTA / "base", tmp_path / "path" / "to" / "llama-base")
    shutil.copytree(DELTA / "delta", tmp_path / "vicuna-7b-delta-v1.1")
    shutil.copyfile(TOKENIZER, tmp_path / "path" / "to" / "tokenizer.model")
    (tmp_path / "sharegpt.json").write_text(json.dumps([{"id": "1", "conversations": CONVERSATION}] * 4))
    run = Run(monkeypatch, capsys)
    typed = commands()
    assert {words[1] for words in typed} == {"convert", "prune", "export", "recover", "discover"}
    for words in typed:
        extra = [*TINY.get(words[1], ())]
        if words[1] == "prune" and "--layers" not in words and "layer" not in words:
            # Models of two or three layers have no middle.
            extra += ["--layers", "all"]
        names = {"MODEL": "llama-7b-hf"}
        if "--base" in words:
            names["path/to/llama-7B"] = "path/to/llama-base"
        code, _, err = run(*(names.get(word, word) for word in words[1:]), *extra)
        assert code == 0, f"{' '.join(words)}: {err}"
