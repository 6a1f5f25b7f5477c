"""``demo`` from end to end, on a small model in place of the real one."""

from __future__ import annotations

import json
import re

import pytest

from llmpruner.cli import demo


@pytest.fixture
def small(monkeypatch, dense):
    monkeypatch.setattr(demo, "DEMO", str(dense))
    monkeypatch.setattr(demo, "SAMPLES", 2)
    monkeypatch.setattr(demo, "RECOVERY", {**demo.RECOVERY, "max_steps": 2, "cutoff": 512})
    return dense


@pytest.mark.slow
def test_the_demo_shows_what_prune_does_by_default(run, small, tmp_path):
    shown = run("demo", "-o", tmp_path / "demo", "--ratio", 0.3, "--seed", 3)
    assert shown.code == 0, shown.err
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["pruned", "recovered"]
    told = next(line for line in shown.out.splitlines() if line.startswith("The same as: llmpruner prune demo "))
    options = re.sub(r".* demo (.*) -o …$", r"\1", told).split()
    assert options == ["--ratio", "0.3", "--samples", "2", "--seed", "3"]
    plan = run("prune", small, *options, "-o", tmp_path / "by_hand", "--json").json()["plan"]
    assert plan["compensation"]["name"] == "refit"
    record = json.loads((tmp_path / "demo" / "recovered" / "llmpruner.json").read_text())
    assert record["plans"] == [plan] and len(record["recovery"][0]["losses"]) == 2
    header = next(line for line in shown.out.splitlines() if "dense" in line).split()
    assert [word for word in header if word.isalpha()] == ["dense", "pruned", "recovered"]
    for folder in ("demo/pruned", "by_hand"):
        assert run("generate", tmp_path / folder, "-p", "The fox", "--max-new-tokens", 2).code == 0
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("demo/pruned", "by_hand")]
    assert weights[0] == weights[1]
