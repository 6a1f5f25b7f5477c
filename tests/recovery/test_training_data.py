"""Data for a training: its forms, rows, and what is held back; examples that the dense model writes."""

import json
import re
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from recovery_cases import dense_model, model_of, write_lines

from llmpruner import DataError, ModelFamily, RunSettings, api
from llmpruner.calibration import written
from llmpruner.calibration.conversations import read_examples
from llmpruner.calibration.written import answered, text_of
from llmpruner.errors import OutputError
from llmpruner.models.chat_format import alpaca_prompt
from llmpruner.recovery import data as training_data
from llmpruner.recovery.data import ROWS, DenseText, dense_text_in, prepare, read_data, write_examples
from llmpruner.settings import RecoverSettings

FAMILY = ModelFamily()
ASKED = {"instruction": "Name the capital of France.", "input": "", "output": "Paris."}


def prepared(source, *, positions=None, **options):
    settings = RecoverSettings(data=str(source), **{"validation": 0, "cutoff": 400, **options})
    return prepare(settings, read_data(settings.data), FAMILY, tiny_models.tokenizer(), positions)


def texts(rows):
    return [tiny_models.tokenizer().decode(row["input_ids"]) for row in rows]


def test_examples_are_joined(tmp_path):
    rows = [ASKED, {"text": "The fox jumps."}, {"prompt": "The sky is", "completion": " blue."}]
    data = prepared(write_lines(tmp_path / "a.jsonl", rows))
    (joined,) = texts(data.rows)
    asked = alpaca_prompt("Name the capital of France.") + "Paris.</s>"
    assert joined == f"{asked}The fox jumps.</s>The sky is blue.</s>"
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
    rows = [{**ASKED, "instruction": f"Question {number}."} for number in range(300)]
    source = write_lines(tmp_path / "a.jsonl", rows)
    counts = {}
    for validation, limit in ((0.02, None), (0.3, None), (0.02, 12), (5, None), (0.02, 4)):
        data = prepared(source, validation=validation, limit=limit, cutoff=100_000)
        counts[validation, limit] = len(data.validation) if data.held_out else 0
        if data.held_out:
            held, trained = asked_in(data.validation), asked_in(data.rows)
            assert len(held) == len(data.validation) and len(held | trained) == (limit or 300) and not held & trained
    assert counts == {(0.02, None): 48, (0.3, None): 60, (0.02, 12): 2, (5, None): 5, (0.02, 4): 0}
    none = prepared(source, cutoff=20)
    assert not none.held_out and none.validation == none.rows[:: len(none.rows) // 48][:48]
    with pytest.raises(DataError, match="--validation takes 300 of them; leave some to train on"):
        prepared(source, validation=300)


def asked_in(rows):
    return set(re.findall(r"Question \d+\.", "".join(texts(rows))))


def test_a_limit_draws_by_seed(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{**ASKED, "instruction": f"Question {n}."} for n in range(50)])
    one, again, other = (prepared(source, limit=5, seed=seed, cutoff=10_000) for seed in (1, 1, 2))
    assert len(asked_in(one.rows)) == 5 and one == again != other


def test_the_demo_instructions_are_complete_and_distinct():
    file = files("llmpruner") / "demo" / "instructions.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(read_examples(str(file))) == len(rows) == len({(r["instruction"], r["input"]) for r in rows}) >= 160
    assert all(set(r) == {"instruction", "input", "output"} and r["output"].strip() == r["output"] != "" for r in rows)


# Text of the dense model


TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


INSTRUCTIONS = (Path(written.__file__).parent / "instructions.txt").read_text(encoding="utf-8").splitlines()


def test_the_instructions_are_many_and_distinct():
    assert 250 <= len(INSTRUCTIONS) <= 400 and len({one.lower() for one in INSTRUCTIONS}) == len(INSTRUCTIONS)
    assert all(one == one.strip() and 8 < len(one) < 250 for one in INSTRUCTIONS)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("self", DenseText("self", ROWS // 4, 3 * ROWS // 4)), ("self:40", DenseText("self:40", 10, 30)),
        ("a.jsonl", None), ("3*a.jsonl,1*self:8", DenseText("self:8", 2, 6)), ("myself", None), ("selfish/data", None),
        ("self-text", DenseText("self-text", 0, ROWS)), ("a.jsonl,self-text:8", DenseText("self-text:8", 0, 8)),
        ("self:1", DenseText("self:1", 1, 0)), ("self:3", DenseText("self:3", 1, 2)), ("self-texts", None),
    ],
)  # fmt: skip
def test_the_source_and_its_number_of_rows(data, expected):
    assert dense_text_in(data) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("self:", "--data self:: expected 'self', or 'self:N'"), ("self:0", "expected 'self', or 'self:N'"),
        ("self:ten", "expected 'self', or 'self:N'"), ("self,2*self:4", "name 'self' or 'self-text' once"),
        ("self-text:0", "expected 'self-text', or 'self-text:N'"),
        ("self,self-text", "name 'self' or 'self-text' once"),
    ],
)  # fmt: skip
def test_wrong_numbers_of_rows_are_refused(data, message):
    with pytest.raises(DataError, match=message):
        dense_text_in(data)


def test_a_file_of_that_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").write_text("")
    assert dense_text_in("self") is None


def test_text_ends_with_a_sentence():
    tokenizer = SimpleNamespace(decode=lambda text, **_: text)
    for text, kept in (
        ("One. Two! And th", "One. Two!"),
        ("a list\n- b\n\nand the", "a list\n- b"),
        ("no end", "no end"),
    ):
        assert text_of(tokenizer, text, finished=False) == kept and text_of(tokenizer, text, finished=True) == text


@pytest.mark.parametrize("drawn", [False, True])
def test_answers_are_the_likeliest_tokens_or_follow_the_numbers_of_their_row(monkeypatch, drawn):
    """The token of a step is where the cumulative probability exceeds the row's number, whatever the padding."""
    monkeypatch.setattr("llmpruner.models.numbers.computes_bfloat16_fast", lambda model: False)
    model, tokenizer = dense_model(), tiny_models.tokenizer()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    numbers = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) if drawn else None
    found = answered(model, tokenizer, prompts, 6, numbers)
    for row, (prompt, answer) in enumerate(zip(prompts, found, strict=True)):
        ids = list(prompt)
        for step in range(6):
            with torch.no_grad():
                predicted = model(torch.tensor([ids])).logits[0, -1].float().softmax(-1)
            upto = predicted.cumsum(-1)
            token = int((upto <= float(numbers[row, step]) * float(upto[-1])).sum() if drawn else predicted.argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        assert answer == ids[len(prompt) :]
    assert found == answered(model, tokenizer, prompts, 6, numbers)


def dense_and_pruned(home, template=None):
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = template
    dense_model().save_pretrained(home / "dense")
    tokenizer.save_pretrained(home / "dense")
    api.prune(str(home / "dense"), output=home / "pruned", ratio=0.2, importance="l1", compensate="none")
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return dense_and_pruned(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(training_data, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(training_data, "TEXT_TOKENS", 6)
    monkeypatch.setattr(written, "passages_at_once", lambda *_: 4)


def recover(home, output, data="self:24", **options):
    values = {"max_steps": 1, "batch_size": 4, "cutoff": 256, "strategy": "lora", **options}
    return api.recover(str(home / "pruned"), data=data, output=output, **values)


def rows_in(folder):
    (file,) = folder.glob("self-*.jsonl")
    return [json.loads(line) for line in file.read_text().split("\n") if line]


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["family's format", "template"])
def test_a_model_recovers_without_a_corpus(tmp_path, template):
    made = recover(dense_and_pruned(tmp_path, template), tmp_path / "out", work_dir=tmp_path / "work")
    rows = rows_in(tmp_path / "work")
    asked = [row["instruction"] for row in rows if "instruction" in row]
    assert set(asked) <= set(INSTRUCTIONS) and len(set(asked)) == len(asked) and 4 <= len(asked) <= 6
    assert 14 <= sum("completion" in row for row in rows) <= 18
    record = made.record["recovery"][0]
    assert record["data"] == "self:24" and record["examples"] == len(rows) - record["validation_examples"]


def test_an_interrupted_job_goes_on_with_the_same_rows(home, tmp_path, monkeypatch):
    recover(home, tmp_path / "one", work_dir=tmp_path / "work")
    rows = rows_in(tmp_path / "work")
    # Nothing is written, and the dense model is not loaded.
    with monkeypatch.context() as patch:
        patch.setattr("llmpruner.recovery.dense.load_model", lambda *_, **__: pytest.fail("loaded"))
        recover(home, tmp_path / "again", work_dir=tmp_path / "work")
    with pytest.raises(OutputError, match="state of another recovery"):
        recover(home, tmp_path / "other", work_dir=tmp_path / "work", seed=3)
    recover(home, tmp_path / "anew", work_dir=tmp_path / "work", run=RunSettings(restart=True))
    assert rows_in(tmp_path / "work") == rows
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(OutputError, match="is not the folder of an interrupted run"):
        recover(home, tmp_path / "other", work_dir=tmp_path / "mine", run=RunSettings(restart=True))
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_model_that_writes_blanks_is_named(monkeypatch):
    monkeypatch.setattr(written, "text_of", lambda *_, **__: "")
    with pytest.raises(DataError, match="writes nothing but blanks"):
        write_examples(DenseText("self:4", 1, 3), model_of(dense_model()), 0)
