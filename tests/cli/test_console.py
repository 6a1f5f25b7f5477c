"""Progress where standard error is no terminal: a line a minute, and no blank ones."""

import json
import time

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
    # Float16 that became float32 need not be quantised: ChatGLM, for example, has no GGUF.
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "model.safetensors").write_bytes(b"x" * 2**18)
    (pruned / "llmpruner.json").write_text(json.dumps({"base_path": str(tmp_path / "dense")}))
    told = "0.5 MiB of weights (dense: 0.2 MiB); --dtype float16 or bfloat16 keeps 16 bits; "
    assert sizes_text(pruned, pruned) == told


def test_brackets_and_colons_of_paths_are_printed(run, dense, tmp_path):
    """They are neither markup nor emoji."""
    made = tmp_path / "o[v2]:100:"
    done = run("prune", dense, "--set", "prune.unit_ratio=0.25", "--importance", "l1", "-o", made)
    assert str(made) in done.out, done.err
    assert str(made) in run("verify", made).out
