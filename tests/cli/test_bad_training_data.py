"""Data that cannot be trained on is named in one line before weights are read."""

from __future__ import annotations

import json
import shutil

import pytest

from llmpruner.models import opening

ROW = {"instruction": "Name the capital of France.", "output": "Paris."}

CASES = {
    "no line": ("", (), "a.jsonl holds no records"),
    "another column later": (
        json.dumps(ROW) + '\n{"instruction": "a"}\n', (), "a.jsonl, line 2: expected 'instruction', 'output'",
    ),
    "no answer": (
        json.dumps(ROW) + '\n{"messages": [{"role": "user", "content": "Hi"}]}\n', (),
        "a.jsonl, line 2: there is no answer",
    ),
    "NaN": (json.dumps(ROW) + '\n{"instruction": "a", "output": NaN}\n', (), "'output' must be text, found float"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line_before_the_model_is_loaded(refused, tmp_path, monkeypatch, case):
    text, options, message = CASES[case]
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
