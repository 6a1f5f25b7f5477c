"""Every command and every piece of Python in the README runs, in its order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    lines = [line for block in re.findall(r"^```\n(.*?)^```", README, re.S | re.M) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("llmpruner ")]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_readme_runs(run, shared, dense, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alpaca.jsonl").write_text((shared / "data.jsonl").read_text())
    (tmp_path / "text.txt").write_text((shared / "text.txt").read_text())
    told = commands()
    assert [words[1] for words in told] == [
        "plugins",
        "discover",
        "plan",
        "prune",
        "recover",
        "evaluate",
        "generate",
        "report",
        "verify",
    ]
    for words in told:
        # Without data, the dense model would write 512 rows.
        extra = {"evaluate": ["--window", "32"], "recover": ["--data", "alpaca.jsonl"]}.get(words[1], [])
        outcome = run(*(str(dense) if word == "MODEL" else word for word in words[1:]), *extra)
        assert outcome.code == 0, f"{' '.join(words)}: {outcome.err}"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "alpaca.jsonl",
        "plan.json",
        "pruned",
        "recovered",
        "report.html",
        "text.txt",
    ]
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        names: dict = {}
        exec(block, names)
        assert names["model"].config.num_hidden_layers > 0


def test_the_make_targets_exist():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
