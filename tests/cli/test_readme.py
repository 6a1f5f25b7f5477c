"""Every command and every piece of Python in the README runs, in its order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)


def commands() -> list[list[str]]:
    lines = [line for language, block in BLOCKS if not language for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("llmpruner ")]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_readme_runs(run, shared, dense, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text((shared / "text.txt").read_text())
    told = commands()
    # Otherwise the dense model writes 256 samples, and 512 rows.
    less = {"prune": ("--samples", "4"), "recover": ("--data", str(shared / "data.jsonl"), "--max-steps", "1")}
    assert [words[1] for words in told] == ["prune", "recover", "evaluate"]
    for words in told:
        outcome = run(*(str(dense) if word == "MODEL" else word for word in words[1:]), *less.get(words[1], ()))
        assert outcome.code == 0, f"{' '.join(words)}: {outcome.err}"
    use, plugin = (block for language, block in BLOCKS if language == "python")
    names: dict = {}
    exec(use.replace('"demo"', repr(str(dense))), names)
    assert names["model"].outcome.decoder_removed > 0
    exec(plugin, names)
    assert names["llmpruner_model_families"]() == [names["Heron"]]


def test_the_make_targets_exist():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
