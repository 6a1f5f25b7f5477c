"""Results that are kept: what was measured once is not measured again, whatever else has changed."""

from __future__ import annotations

import json
import math

import pytest
import tiny_models
from llmpruner_llama.family import LlamaFamily

from llmpruner import Metric, MetricSubject, build_graph
from llmpruner.errors import OutputError
from llmpruner.evaluation.metrics import PerplexityMetric, SizeMetric
from llmpruner.evaluation.run import Candidate, evaluate
from llmpruner.evaluation.store import ResultStore
from llmpruner.progress import Progress


class Slow(Metric):
    """Two parts, whose calls are recorded."""

    name = "slow"

    def parts(self):
        return "a", "b"

    def depends_on(self, part):
        return {"part": part}

    def measure_part(self, subject, part):
        CALLS.append((subject.name, part))
        if len(CALLS) == STOP:
            raise KeyboardInterrupt
        return {part: math.inf if part == "b" else len(subject.name)}


class Timed(Metric):
    """Depends on the machine."""

    name = "timed"

    def measure(self, subject):
        CALLS.append((subject.name, "timed"))
        return {"seconds": 1.0}


class Compared(Metric):
    name = "compared"
    needs_reference = True

    def depends_on(self, part):
        return {}

    def measure(self, subject):
        CALLS.append((subject.name, "compared"))
        return {"same": subject.reference is subject.model}


class Alike(Slow):
    """Says the same of both parts."""

    name = "alike"

    def depends_on(self, part):
        return self.record()


CALLS: list[tuple[str, str]] = []
STOP = None
LOADED: list[str] = []


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    CALLS.clear()
    LOADED.clear()


@pytest.fixture(scope="module")
def model():
    return tiny_models.llama()


@pytest.fixture
def candidates(model):
    def candidate(name, fingerprint):
        def load():
            LOADED.append(name)
            return MetricSubject(name, model, tiny_models.tokenizer(), build_graph(LlamaFamily(), model.config))

        return Candidate(name, load, fingerprint)

    return lambda **named: [candidate(name, fingerprint) for name, fingerprint in named.items()]


def test_a_run_that_is_stopped_keeps_what_it_measured_and_a_second_run_measures_the_rest(
    tmp_path, candidates, monkeypatch
):
    models = candidates(one=1, other=2)
    monkeypatch.setattr(f"{__name__}.STOP", 4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(models, [Slow()], store=ResultStore(tmp_path))
    monkeypatch.setattr(f"{__name__}.STOP", None)
    CALLS.clear(), LOADED.clear()
    found = evaluate(models, [Slow()], store=ResultStore(tmp_path))
    assert CALLS == [("other", "b")] and LOADED == ["other"]
    assert found[0].results["slow"] == {"a": 3, "b": math.inf} and found[1].results["slow"]["a"] == 5
    CALLS.clear(), LOADED.clear()
    assert evaluate(models, [Slow()], store=ResultStore(tmp_path)) == found
    assert CALLS == LOADED == []


def test_parts_of_which_a_metric_says_the_same_are_kept_apart(tmp_path, candidates):
    store, models = ResultStore(tmp_path), candidates(one=1)
    first, second = (evaluate(models, [Alike()], store=store) for _ in range(2))
    assert CALLS == [("one", "a"), ("one", "b")] and first == second


def test_a_changed_model_and_a_metric_of_the_machine_are_measured_again(tmp_path, candidates):
    evaluate(candidates(one=1, memory=None), [Slow(), Timed()], store=ResultStore(tmp_path))
    CALLS.clear()
    evaluate(candidates(renamed=1, changed=3, memory=None), [Slow(), Timed()], store=ResultStore(tmp_path))
    both = ["a", "b", "timed"]
    assert [("renamed", "timed"), *(("changed", p) for p in both), *(("memory", p) for p in both)] == CALLS
    CALLS.clear()
    evaluate(candidates(one=1), [Slow()], store=ResultStore(tmp_path, again=True))
    assert CALLS == [("one", "a"), ("one", "b")]


def test_a_comparison_depends_on_the_first_model_which_is_loaded_only_where_it_is_needed(tmp_path, candidates):
    evaluate(candidates(one=1, other=2), [Compared()], store=ResultStore(tmp_path))
    LOADED.clear(), CALLS.clear()
    evaluate(candidates(one=1, other=2, third=3), [Compared()], store=ResultStore(tmp_path))
    assert LOADED == ["one", "third"] and CALLS == [("third", "compared")]
    CALLS.clear()
    evaluate(candidates(third=3, other=2), [Compared()], store=ResultStore(tmp_path))
    assert CALLS == [("third", "compared"), ("other", "compared")]


def test_a_text_is_known_by_its_content_and_a_result_by_its_settings(tmp_path, candidates, monkeypatch):
    import llmpruner.evaluation.perplexity as heavy

    real, calls = heavy._predictions, []
    monkeypatch.setattr(heavy, "_predictions", lambda *given: calls.append(1) or real(*given))
    for name, text in (("a.txt", tiny_models.TEXT), ("copy.txt", tiny_models.TEXT), ("b.txt", tiny_models.TEXT[9:])):
        (tmp_path / name).write_text(text)

    def measured(text, **settings):
        calls.clear()
        metric = PerplexityMetric(text=text, **{"window": 16, "tokens": 32, **settings})
        (found,) = evaluate(candidates(one=1), [metric], store=ResultStore(tmp_path / "kept"))
        return len(calls), found

    a, b, copy = (str(tmp_path / name) for name in ("a.txt", "b.txt", "copy.txt"))
    assert measured(a)[0] == 1 and measured(a)[0] == 0 and measured(a, window=8)[0] == 1
    (count, both), (_, alone) = measured(f"{copy},{b}"), measured(b)
    assert count == 1 and both.perplexity.text == copy
    plain = both.as_json()["perplexity"]["others"][b]
    assert plain["perplexity"] == alone.perplexity.perplexity != both.perplexity.perplexity
    assert [row.label for row in both.rows][:2] == ["perplexity, copy.txt", "bits per byte, copy.txt"]
    assert both.perplexities == {copy: both.perplexity.perplexity, b: alone.perplexity.perplexity}


def test_damaged_files_are_measured_again_and_a_folder_that_cannot_be_written_is_said(tmp_path, candidates, caplog):
    store = ResultStore(tmp_path / "kept")
    evaluate(candidates(one=1), [SizeMetric()], store=store)
    (file,) = (tmp_path / "kept" / "evaluations").iterdir()
    whole = json.loads(file.read_text())
    file.write_text("{")
    evaluate(candidates(one=1), [SizeMetric()], store=store)
    assert json.loads(file.read_text()) == whole
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; results are kept in a folder"):
        ResultStore(tmp_path / "file")
    blocked = ResultStore(tmp_path / "file" / "below")
    assert evaluate(candidates(one=1), [SizeMetric()], store=blocked)[0].size.parameters > 0
    assert caplog.text.count("results are not kept for another run") == 1


def test_one_bar_covers_all_models_and_metrics(candidates, tmp_path):
    (tmp_path / "text.txt").write_text(tiny_models.TEXT)
    seen = []

    class Bars(Progress):
        def bar(self, label):
            from contextlib import contextmanager

            @contextmanager
            def one():
                yield lambda share, now: seen.append((share, now))

            return one()

        def track(self, items, label):
            raise AssertionError("a second bar")

    metric = PerplexityMetric(text=str(tmp_path / "text.txt"), window=16, tokens=64, batch_size=1)
    evaluate(candidates(one=1, other=2), [SizeMetric(), metric], Bars())
    shares = [share for share, _ in seen]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == pytest.approx(1)
    assert len({share for share, now in seen if "other: perplexity" in now}) == 5
