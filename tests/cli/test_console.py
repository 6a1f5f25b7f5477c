"""Progress where standard error is no terminal: a line a minute, and no blank ones."""

from __future__ import annotations

import json
import time

import pytest

from llmpruner.cli import console
from llmpruner.cli.console import RichProgress, sizes_text


def test_a_line_a_minute(capsys, monkeypatch):
    progress = RichProgress()
    with progress.bar("Measuring [inputs]") as at:
        at(0.25, "Measuring [inputs]")
    assert capsys.readouterr().err == "", "no minute has passed"
    progress.status("loading model")
    monkeypatch.setattr(console, "_LINE_EVERY", 0.02)
    for _ in progress.track(["a", "b", "c", "d"], "Measuring [inputs]"):
        time.sleep(0.1)
    first, *_, half, last = capsys.readouterr().err.splitlines()
    assert first == "• loading model"
    assert half.startswith("• Measuring [inputs], 50% done, 0:00:0")
    assert last.startswith("• Measuring [inputs], 75% done, 0:00:0")


def test_sizes_are_next_to_those_of_the_dense_model(tmp_path):
    (tmp_path / "q4.gguf").write_bytes(b"x" * 2**20)
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    (pruned / "model.safetensors").write_bytes(b"x" * 2**21)
    (pruned / "llmpruner.json").write_text(json.dumps({"base_path": str(tmp_path / "q4.gguf")}))
    assert "2.0 MiB of weights (q4.gguf: 1.0 MiB); quantise it: export --to gguf --set" in sizes_text(pruned, pruned)
    (pruned / "model.safetensors").write_bytes(b"x" * 2**19)
    assert sizes_text(pruned, pruned) == "0.5 MiB of weights (q4.gguf: 1.0 MiB); "


@pytest.mark.parametrize("width", [80, 300])
def test_numbers_and_titles_of_tables_are_not_broken(monkeypatch, capsys, width):
    monkeypatch.setattr(console.out, "width", width)
    title = "KL divergence from the dense model"
    columns = ("Batch", "Prompt", "Model", "Tokens/s (quartiles)", "Speed-up", "Ideal", "Reached")
    rows = [("1", "128", name, "11,756 (11,756–11,756)", "1.00", "1.00", "100%") for name in ("dense", "long-name")]
    console.table(title, columns, rows, left=3)
    console.table(title, ("a", "b"), [("1", "2")])
    shown = capsys.readouterr().out
    assert shown.count("11,756 (11,756–11,756)") == 2 and shown.splitlines().count(title) == 2


def test_square_brackets_of_paths_are_printed(run, shared, tmp_path):
    """They are no markup."""
    folder = tmp_path / "o[v2]"
    folder.mkdir()
    made = folder / "pruned"
    for arguments, written in (
        (("prune", shared / "dense", "--set", "prune.unit_ratio=0.25", "--importance", "l1", "-o", made), made),
        (("verify", made), made),
        (("export", made, "--to", "stock", "-o", folder / "stock"), folder / "stock"),
        (("discover", made), made),
    ):
        done = run(*arguments)
        assert done.code == 0, done.err
        assert str(written) in done.out, done.out
