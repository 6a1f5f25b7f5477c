import json
from dataclasses import replace

import pytest
import tiny_models
import torch

from llmpruner import DataError, ModelFamily
from llmpruner.calibration.chat import IGNORED, TrainingText, Turn
from llmpruner.discovery.family import alpaca_prompt
from llmpruner.recovery.examples import Examples, load_examples, tokenise
from llmpruner.recovery.trainer import collator_for

FAMILY = ModelFamily()
RECORDS = [
    {"instruction": "Name the capital of France.", "input": "", "output": "Paris."},
    {"instruction": "Add the numbers.", "input": "2 and 2", "output": "4"},
    {"text": "The fox jumps."},
    {"prompt": "The sky is", "completion": " blue."},
]


def load(path, **options):
    return load_examples(str(path), FAMILY, tiny_models.tokenizer(), **options)


def texts(*turns):
    """One example for each tuple of turns."""
    return Examples(tuple(TrainingText(row) for row in turns), "here")


def write_lines(path, records):
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    return str(path)


def test_json_and_jsonl_give_the_same_examples_in_order(tmp_path):
    lines = load(write_lines(tmp_path / "a.jsonl", RECORDS))
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    listed = load(str(tmp_path / "a.json"))
    assert lines == replace(listed, source=lines.source, places=lines.places)
    assert lines.places == tuple(f"{tmp_path}/a.jsonl, line {n}" for n in (1, 2, 3, 4))
    assert listed.places[1] == f"{tmp_path}/a.json, record 2"
    assert lines.texts == (
        TrainingText((Turn(alpaca_prompt("Name the capital of France."), "Paris."),)),
        TrainingText((Turn(alpaca_prompt("Add the numbers.", "2 and 2"), "4"),)),
        TrainingText((Turn("", "The fox jumps."),)),
        TrainingText((Turn("The sky is", " blue."),)),
    )


def test_fingerprint_follows_content_and_order(tmp_path):
    first = load(write_lines(tmp_path / "a.jsonl", RECORDS))
    again = load(write_lines(tmp_path / "b.jsonl", RECORDS))
    other = load(write_lines(tmp_path / "c.jsonl", RECORDS[::-1]))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_limit_draws_by_seed(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(50)])
    drawn = load(path, limit=5, seed=1)
    assert len(drawn.texts) == 5
    assert drawn.texts == load(path, limit=5, seed=1).texts
    assert drawn.texts != load(path, limit=5, seed=2).texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3: not valid JSON"),
        ("a.json", '[\n{"text": "x"},\n]', r"a\.json, line [23]: not valid JSON"),
        ("a.jsonl", "\n", r"a\.jsonl has no examples"),
        ("a.json", "[]", r"a\.json has no examples"),
        ("a.jsonl", '{"question": "x"}', r"line 1: expected 'instruction', 'output'.*found 'question'"),
        ("a.jsonl", '{"instruction": "x", "output": 4}', r"line 1: 'output' must be text, found int"),
        ("a.jsonl", '{"instruction": " ", "output": "x"}', r"line 1: 'instruction' is empty"),
        ("a.jsonl", '"text"', r"line 1: expected .*; found str"),
        ("a.csv", "x,y", r"a\.csv: expected 'instruction', 'output'.*; found str"),
    ],
)
def test_malformed_data_is_named_with_its_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load(str(path))


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="is a directory"):
        load(str(tmp_path))


def test_dataset_that_cannot_be_loaded(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*name, split):
        raise ConnectionError("cannot reach the hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"'someone/something' is no file here.*: cannot reach the hub$"):
        load("someone/something")


def test_loss_on_everything_ends_with_the_end_token():
    tokenizer = tiny_models.tokenizer()
    examples = texts((Turn("Two and two make\n", "four."),))
    (row,) = tokenise(examples, tokenizer, cutoff=256, loss_on="all")
    assert tokenizer.decode(row["input_ids"]) == "Two and two make\nfour.</s>"
    assert row["labels"] == row["input_ids"]


def test_loss_on_answers_covers_exactly_answer_and_end():
    tokenizer = tiny_models.tokenizer()
    turns = (Turn("USER: two ASSISTANT:", " four"), Turn("USER: France ASSISTANT:", " Paris"))
    (row,) = tokenise(texts(turns), tokenizer, cutoff=256, loss_on="answers")
    text = "USER: two ASSISTANT: four</s>USER: France ASSISTANT: Paris</s>"
    assert tokenizer.decode(row["input_ids"]) == text
    learnt = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(learnt) == " four</s> Paris</s>"
    assert all(label in (IGNORED, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


def test_cutoff_truncates_and_leaves_out_what_has_no_answer():
    tokenizer = tiny_models.tokenizer()
    long, short = Turn("a long prompt " * 20, "answer"), Turn("", "dog " * 50)
    examples = texts((long,), (short,))
    (row,) = tokenise(examples, tokenizer, cutoff=16, loss_on="answers")
    assert len(row["input_ids"]) == len(row["labels"]) == 16
    assert tokenizer.eos_token_id not in row["input_ids"]
    with pytest.raises(DataError, match="no example has an answer within the first 16 tokens"):
        tokenise(texts((long,)), tokenizer, cutoff=16, loss_on="answers")


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_are_padded_to_the_longest_row(side, monkeypatch):
    tokenizer = tiny_models.tokenizer()
    assert tokenizer.pad_token is None
    monkeypatch.setattr(tokenizer, "padding_side", side)
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = collator_for(tokenizer, tiny_models.llama())(rows)
    pad = tokenizer.eos_token_id
    expected = [8, pad, pad] if side == "right" else [pad, pad, 8]
    assert batch["input_ids"].tolist() == [[5, 6, 7], expected]
    assert batch["attention_mask"].sum(1).tolist() == [3, 1]
    assert batch["labels"][1].tolist() == [8 if t == 8 else IGNORED for t in expected]
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert tokenizer.pad_token is None, "the tokenizer is saved with the model"
