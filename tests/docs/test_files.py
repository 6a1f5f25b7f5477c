"""``llmpruner.json`` of a pruned and recovered model has the fields that docs/reference/files.md describes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import files_page

import llmpruner

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial"


def test_a_record_has_the_documented_fields(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tiny_model.py", "llama", str(tmp_path / "dense")])
    runpy.run_path(str(TUTORIAL / "tiny_model.py"))
    pruned, data = tmp_path / "pruned", TUTORIAL / "lines.jsonl"
    llmpruner.prune(tmp_path / "dense", ratio=0.2, importance="l1", output=pruned)
    record = json.loads((pruned / "llmpruner.json").read_text(encoding="utf-8"))
    assert record.keys() == files_page.RECORD.keys() - {"recovery", "adapters"}
    assert record["plans"][0].keys() == llmpruner.PruningPlan.model_fields.keys()
    (work,) = record["work"]
    assert work == {"fits": []}
    assert json.loads((pruned / "run.json").read_text(encoding="utf-8")).keys() == files_page.RUN.keys()
    llmpruner.recover(pruned, data=str(data), max_steps=1, batch_size=2, output=tmp_path / "recovered")
    record = json.loads((tmp_path / "recovered" / "llmpruner.json").read_text(encoding="utf-8"))
    assert record.keys() == files_page.RECORD.keys() - {"adapters"}
    assert record["recovery"][0].keys() == files_page.RECOVERY.keys()
    llmpruner.export(tmp_path / "dense", to="stock", output=tmp_path / "stock")
    origin = json.loads((tmp_path / "stock" / "llmpruner-files.json").read_text(encoding="utf-8"))
    assert origin.keys() == files_page.ORIGIN.keys() - {"format"}
    llmpruner.export(tmp_path / "dense", to="nemotron-nas", output=tmp_path / "served")
    origin = json.loads((tmp_path / "served" / "llmpruner-files.json").read_text(encoding="utf-8"))
    assert origin.keys() == files_page.ORIGIN.keys()
