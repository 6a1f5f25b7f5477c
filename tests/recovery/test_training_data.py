"""Data for a training: its forms, rows, and what is held back."""

import json
from importlib.resources import files

import pytest
import tiny_models
from recovery_cases import write_lines

from llmpruner import DataError, ModelFamily
from llmpruner.calibration.conversations import read_examples
from llmpruner.models.chat_format import alpaca_prompt
from llmpruner.recovery.data import prepare, read_data
from llmpruner.settings import RecoverSettings

FAMILY = ModelFamily()
ASKED = {"instruction": "Name the capital of France.", "input": "", "output": "Paris."}


def prepared(source, *, positions=None, **options):
    settings = RecoverSettings(data=str(source), **{"validation": 0, "cutoff": 400, **options})
    return prepare(settings, read_data(settings.data), FAMILY, tiny_models.tokenizer(), positions)


def texts(rows):
    return [tiny_models.tokenizer().decode(row["input_ids"]) for row in rows]


def test_an_instruction_is_a_row_and_texts_are_joined(tmp_path):
    rows = [ASKED, {"text": "The fox jumps."}, {"prompt": "The sky is", "completion": " blue."}]
    data = prepared(write_lines(tmp_path / "a.jsonl", rows))
    asked, joined = texts(data.rows)
    assert asked == alpaca_prompt("Name the capital of France.") + "Paris.</s>"
    assert joined == "The fox jumps.</s>The sky is blue.</s>"
    assert all(row["labels"] == row["input_ids"] for row in data.rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    listed = prepared(tmp_path / "a.json")
    assert listed == data


def test_rows_have_the_length_of_the_cutoff(tmp_path):
    data = prepared(write_lines(tmp_path / "a.jsonl", [ASKED, *[{"text": "The fox jumps. " * 9}] * 5]), cutoff=16)
    assert {len(row["input_ids"]) for row in data.rows} == {16} and len(data.rows) > 5
    short = prepared(tmp_path / "a.jsonl", cutoff=16, positions=8)
    assert {len(row["input_ids"]) for row in short.rows} == {8}


def test_a_share_is_held_back(tmp_path):
    rows = [{**ASKED, "instruction": f"Question {number}"} for number in range(300)]
    source = write_lines(tmp_path / "a.jsonl", rows)
    counts = {}
    for validation, limit in ((0.02, None), (0.3, None), (0.02, 12), (5, None), (0.02, 4)):
        data = prepared(source, validation=validation, limit=limit)
        counts[validation, limit] = len(data.validation) if data.held_out else 0
        if data.held_out:
            assert len(data.rows) + len(data.validation) == (limit or 300)
            assert not set(texts(data.rows)) & set(texts(data.validation))
    assert counts == {(0.02, None): 48, (0.3, None): 60, (0.02, 12): 2, (5, None): 5, (0.02, 4): 0}
    none = prepared(source)
    assert not none.held_out and none.validation == none.rows[0:288:6]
    with pytest.raises(DataError, match="--validation takes 300 of them; leave some to train on"):
        prepared(source, validation=300)


def test_a_limit_draws_by_seed(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{**ASKED, "output": f"text {n}"} for n in range(50)])
    one, again, other = (prepared(source, limit=5, seed=seed) for seed in (1, 1, 2))
    assert len(one.rows) == 5 and one == again != other


def test_the_demo_instructions_are_complete_and_distinct():
    file = files("llmpruner") / "demo" / "instructions.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(read_examples(str(file))) == len(rows) == len({(r["instruction"], r["input"]) for r in rows}) >= 160
    assert all(set(r) == {"instruction", "input", "output"} and r["output"].strip() == r["output"] != "" for r in rows)
