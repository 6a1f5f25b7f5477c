import json
from importlib.resources import files

from llmpruner.calibration.conversations import read_examples

PATH = files("llmpruner") / "demo" / "instructions.jsonl"


def records():
    return [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


def test_the_demo_instructions_are_complete_and_distinct():
    rows = records()
    assert len(rows) >= 160
    assert len(read_examples(str(PATH))) == len(rows)
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows)
    assert all(set(row) == {"instruction", "input", "output"} for row in rows)
    assert all(row["output"] and row["output"] == row["output"].strip() for row in rows)
    assert sum(bool(row["input"]) for row in rows) >= 40
