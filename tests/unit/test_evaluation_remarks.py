"""Evaluation text that the calibration read, and repairs that helped this text alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import tiny_models
from llmpruner_llama.family import LlamaFamily
from said import Said

from llmpruner import MetricSubject, api, build_graph
from llmpruner.calibration.passages import overlap, passages_of
from llmpruner.evaluation.generations import GenerationsMetric
from llmpruner.evaluation.metrics import PerplexityMetric
from llmpruner.evaluation.remarks import remarks
from llmpruner.evaluation.results import Evaluation
from llmpruner.evaluation.run import Candidate, evaluate
from llmpruner.models.record import read_record


def words(seed, count):
    drawn = random.Random(seed)
    return " ".join(f"w{drawn.randrange(500)}" for _ in range(count))


def test_overlap_is_the_share_of_equal_passages_wherever_they_stand():
    one, other = words(1, 4000), words(2, 4000)
    read = passages_of([other[:7000], words(3, 500)])
    assert overlap(one, read) == 0
    assert overlap(other, read) == pytest.approx(7000 / len(other), abs=0.08)
    assert overlap(f"{one} {other.upper()}!", passages_of([f"x, {other}"])) == pytest.approx(0.5, abs=0.08)
    assert overlap("too short to say", read) is None


def measured(name, overlap=None, **perplexities):
    (first, own), *others = perplexities.items()
    found = {"text": first, "perplexity": own, "others": {text: {"perplexity": value} for text, value in others}}
    return Evaluation(name, {"perplexity": found}, calibration_overlap=overlap or {})


def test_a_repair_that_helped_its_own_text_alone_is_said_and_one_that_helped_both_is_not():
    dense = measured("dense", wiki=25.6, chat=7.6)
    own = {"wiki": 0.9, "chat": 0.0}
    (seen, alone) = remarks([dense, measured("fitted to wiki", own, wiki=29.6, chat=15.1)])
    assert "fitted to wiki: its calibration read 90% of the passages of wiki" in seen
    assert "1.99 times the dense model's on chat, 1.16 times on wiki" in alone
    assert len(remarks([dense, measured("mixed", own, wiki=36.5, chat=13.2)])) == 1
    assert remarks([dense, measured("unknown", wiki=29.6, chat=15.1)]) == []
    # Little is lost on either, though many times as much on the other.
    assert len(remarks([dense, measured("light", own, wiki=25.7, chat=8.2)])) == 1


def test_a_pruned_checkpoint_knows_the_text_of_its_calibration(tmp_path):
    for name, seed in (("read.txt", 1), ("other.txt", 2)):
        (tmp_path / name).write_text(words(seed, 3000))
    text, other = (str(tmp_path / name) for name in ("read.txt", "other.txt"))
    source = tmp_path / "dense"
    tiny_models.llama().save_pretrained(source)
    tiny_models.tokenizer().save_pretrained(source)
    options = {"kinds": "mlp", "ratio": 0.2, "method": "fast", "calibration": text, "samples": 24, "length": 400}
    api.prune(source, output=tmp_path / "pruned", **options)
    assert len(read_record(tmp_path / "pruned")["calibration_passages"]) > 10
    dense, pruned = api.evaluate([source, tmp_path / "pruned"], perplexity=f"{text},{other}", tokens=64, window=32)
    assert dense.calibration_overlap == {} and pruned.calibration_overlap[text] > 0.5
    assert pruned.calibration_overlap[other] == 0
    said = Said()
    api.evaluate([source, tmp_path / "pruned"], perplexity=text, tokens=64, window=32, progress=said)
    assert said.lines == ["4 of 4 results were measured before and kept"]


def test_answers_part_where_the_models_choose_other_tokens(tmp_path):
    one, other = tiny_models.llama(), tiny_models.llama(seed=1)

    def candidate(name, model):
        graph = build_graph(LlamaFamily(), model.config)
        subject = MetricSubject(name, model, tiny_models.tokenizer(), graph, family=LlamaFamily())
        return Candidate(name, lambda: replace(subject))

    metric = GenerationsMetric(new_tokens=6, limit=2)
    first, second = evaluate([candidate("one", one), candidate("other", other)], [metric])
    assert first.results["generations"]["equal"] == 1 and second.results["generations"]["equal"] == 0
    for answer in second.results["generations"]["answers"]:
        assert answer["first"] != answer["answer"] and answer["answer"].startswith(answer["common"])
        assert answer["common_tokens"] < 6
    assert [row.value for row in second.rows] == [0, second.results["generations"]["common_tokens"]]


def test_rows_have_the_texts_of_the_result_whatever_the_settings_are():
    one = {"perplexity": 9.0, "bits_per_byte": 1.0, "kl_per_token": None}
    rows = PerplexityMetric().rows({**one, "text": "data/wiki.txt", "others": {"data/code.jsonl": one}})
    assert [row.label for row in rows][::4] == ["perplexity, wiki.txt", "perplexity, code.jsonl"]
