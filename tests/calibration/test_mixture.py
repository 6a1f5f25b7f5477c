"""Instruction data of several sources, and rows without padding."""

from __future__ import annotations

import json

import pytest
import tiny_models
from llmpruner_llama.family import LlamaFamily

from llmpruner import DataError
from llmpruner.calibration.chat import IGNORED, TrainingText, Turn
from llmpruner.calibration.mixture import Part, mixed, parse_mixture
from llmpruner.recovery.examples import Examples, load_examples, tokenise


def test_sources_and_shares(tmp_path, monkeypatch):
    assert parse_mixture("a.jsonl") == (Part("a.jsonl"),)
    assert parse_mixture("a.jsonl, name:config:train") == (Part("a.jsonl"), Part("name:config:train"))
    assert parse_mixture("3*a.jsonl,b.jsonl") == (Part("a.jsonl", 3.0), Part("b.jsonl", 1.0))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2*a,b.jsonl").write_text("{}")
    assert parse_mixture("2*a,b.jsonl") == (Part("2*a,b.jsonl"),)
    with pytest.raises(DataError, match="a share of 0 takes nothing of 'b'"):
        parse_mixture("a,0*b")
    with pytest.raises(DataError, match="a source with an empty name"):
        parse_mixture("a,,b")


def test_shares_take_as_many_as_there_can_be():
    one, other = list(range(100)), list(range(100, 120))
    assert mixed([(Part("a"), one), (Part("b"), other)], 0) == one + other
    found = mixed([(Part("a", 3.0), one), (Part("b", 1.0), other)], 0)
    assert (len([n for n in found if n < 100]), len([n for n in found if n >= 100])) == (60, 20)
    assert found == sorted(found) and found == mixed([(Part("a", 3.0), one), (Part("b", 1.0), other)], 0)
    assert found != mixed([(Part("a", 3.0), one), (Part("b", 1.0), other)], 1)


def test_an_error_names_the_source_and_the_example(tmp_path):
    for name in "ab":
        lines = [{"instruction": f"{name}{n}", "output": "x"} for n in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    both = f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl"
    found = load_examples(both, LlamaFamily(), tiny_models.tokenizer())
    assert len(found.texts) == 6 and found.source == both
    (tmp_path / "b.jsonl").write_text('{"instruction": 3, "output": "x"}')
    with pytest.raises(DataError, match=r"b\.jsonl"):
        load_examples(both, LlamaFamily(), tiny_models.tokenizer())


def test_packed_rows_are_full_and_hold_every_token_in_order():
    texts = tuple(TrainingText((Turn(f"Question {n}?\n", "Paris. " * (n % 5 + 1)),)) for n in range(20))
    tokenizer, examples = tiny_models.tokenizer(), Examples(texts, "here")
    single = tokenise(examples, tokenizer, cutoff=10_000, loss_on="answers")
    packed = tokenise(examples, tokenizer, cutoff=32, loss_on="answers", pack=True)
    assert {len(row["input_ids"]) for row in packed} == {len(row["labels"]) for row in packed} == {32}
    for key in ("input_ids", "labels"):
        wanted = [value for row in single for value in row[key]]
        assert [value for row in packed for value in row[key]] == wanted[: 32 * len(packed)]
        assert len(wanted) - 32 * len(packed) < 32
    assert any(IGNORED in row["labels"] for row in packed)
    (short,) = tokenise(examples, tokenizer, cutoff=100_000, loss_on="all", pack=True)
    assert short["input_ids"] == [token for row in single for token in row["input_ids"]]


def test_a_text_that_ends_with_blanks_after_its_end_gets_no_second_one():
    """As ChatML, whose end of a message is the end of a sequence, with a new line after it."""
    tokenizer = tiny_models.tokenizer()
    end = tokenizer.eos_token_id
    texts = (TrainingText((Turn("q ", "a</s>\n"),), True), TrainingText((Turn("q ", "a\n"),), True))
    (row,) = tokenise(Examples(texts, "texts"), tokenizer, cutoff=1000, loss_on="all", pack=True)
    assert tokenizer.decode(row["input_ids"]) == "q a</s>\nq a\n</s>"
    assert row["input_ids"].count(end) == 2
