"""Data that cannot be trained on is named in one line before weights are read."""

from __future__ import annotations

import json
import shutil

import pytest

from llmpruner.models import opening

ROW = {"instruction": "Name the capital of France.", "output": "Paris."}
LONG = {"instruction": "Name it. " * 200, "output": "Paris."}

CASES = {
    "no line": ("", (), "a.jsonl holds no records"),
    "another column": ('{"question": "a", "reply": "b"}\n', (), "a.jsonl, line 1: expected 'instruction', 'output'"),
    "another column later": (
        json.dumps(ROW) + '\n{"instruction": "a"}\n', (), "a.jsonl, line 2: expected 'instruction', 'output'",
    ),
    "no answer": (
        json.dumps(ROW) + '\n{"messages": [{"role": "user", "content": "Hi"}]}\n', (),
        "a.jsonl, line 2: there is no answer",
    ),
    "null": (json.dumps(ROW) + '\n{"instruction": "a", "output": null}\n', (), "a.jsonl, line 2: expected"),
    "NaN": (json.dumps(ROW) + '\n{"instruction": "a", "output": NaN}\n', (), "'output' must be text, found float"),
    "answers beyond the cutoff": (
        json.dumps(LONG) + "\n", ("--loss-on", "answers", "--cutoff", 32), "no example has an answer within the first",
    ),
    "all held back": (json.dumps(ROW) + "\n", ("--validation", 1), "has 1 example, and --validation takes 1"),
    "no share": (json.dumps(ROW) + "\n", ("--validation", 1.5), "--validation '1.5': expected a share below 1, or"),
    "patience without validation": (
        json.dumps(ROW) + "\n", ("--validation", 0, "--patience", 2), "--patience has no effect with --validation 0",
    ),
    "a share beside data of its own": (
        json.dumps(ROW) + "\n", ("--validation", 0.1, "--validation-data", "{tmp}/a.jsonl"),
        "--validation has no effect with --validation-data",
    ),
    "validation data that is not there": (
        json.dumps(ROW) + "\n", ("--validation-data", "{tmp}/none.jsonl"), "none.jsonl: no such file",
    ),
    "a tracker that is not installed": (
        json.dumps(ROW) + "\n", ("--report-to", "tensorboard"),
        "--report-to tensorboard: tensorboard is not installed; run: pip install tensorboard",
    ),
    "an unknown tracker": (
        json.dumps(ROW) + "\n", ("--report-to", "tensorbord"), "expected one of tensorboard, wandb, trackio",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line_before_the_model_is_loaded(refused, tmp_path, monkeypatch, case):
    text, options, message = CASES[case]
    monkeypatch.setattr("llmpruner.recipes.jobs.find_spec", lambda name: None)
    loads = []
    monkeypatch.setattr(opening, "_read_model", lambda *_: loads.append(1))
    (tmp_path / "a.jsonl").write_text(text)
    found = refused("recover", "{models}/dense", "--data", "{tmp}/a.jsonl", "-o", "{tmp}/out", *options)
    assert message in found and not loads


def test_a_tokenizer_without_a_padding_token_trains(run, shared, tmp_path):
    """Padding is masked, so that any token serves."""
    model = tmp_path / "model"
    shutil.copytree(shared / "dense", model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    assert "pad_token" not in config
    for name in ("eos_token", "bos_token"):
        config.pop(name, None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    options = ("--max-steps", 1, "--batch-size", 2, "--strategy", "full")
    assert run("recover", model, "--data", shared / "data.jsonl", "-o", tmp_path / "out", *options).code == 0


def test_validation_is_shown_and_recorded(run, shared, tmp_path):
    data = shared / "data.jsonl"
    options = ("--max-steps", 2, "--batch-size", 2, "--strategy", "full", "--learning-rate", 0.01, "--eval-steps", 1)
    done = run("recover", shared / "dense", "--data", data, "--validation-data", data, "-o", tmp_path / "out", *options)
    assert done.code == 0, done.err
    lines = [line for line in done.err.splitlines() if "validation loss" in line and "perplexity" in line]
    assert [line.partition("step ")[2][0] for line in lines] == ["0", "1", "2"]
    (record,) = json.loads((tmp_path / "out" / "llmpruner.json").read_text())["recovery"]
    assert [one["step"] for one in record["validation"]] == [0, 1, 2] and record["validation_examples"] == 4
    assert f"validation loss {record['validation'][0]['loss']:.3f} → " in done.out
    drawn = (tmp_path / "out" / "loss.svg").read_text()
    assert drawn.startswith("<svg") and drawn.count("<polyline") == 2
    page = tmp_path / "page.html"
    assert run("discover", tmp_path / "out", "--html", page).code == 0
    assert "<h2>Recovery</h2>" in page.read_text() and "<polyline" in page.read_text()
