"""Differences to the first model, with the errors of rows that both answered."""

from __future__ import annotations

import json
import math

import pytest
import tiny_models
from llmpruner_hub.card import _figures
from llmpruner_llama.family import LlamaFamily

from llmpruner import Metric, MetricSubject, Row, build_graph
from llmpruner.evaluation.metrics import TasksMetric
from llmpruner.evaluation.results import Evaluation
from llmpruner.evaluation.run import Candidate, evaluate
from llmpruner.evaluation.store import ResultStore
from llmpruner.evaluation.table import Evaluations, difference
from llmpruner.files import json_text
from llmpruner.recipes.evidence import _measurements


def of(*scores, scored="a", label="piqa acc"):
    return Row(label, sum(scores) / len(scores), True, 0.1, scores, scored)


def test_the_error_is_that_of_the_differences_of_rows():
    first, other = of(1, 1, 0, 1, 0), of(1, 0, 0, 0, 1)
    # Differences 0, −1, 0, −1, 1: their mean is −1/5, their squared deviations are 1/25 · (1 + 16 + 1 + 16 + 36).
    assert difference(first, other) == (pytest.approx(-0.2), pytest.approx(math.sqrt(70 / 25 / 4 / 5)))
    assert difference(first, first) == (0, 0)
    assert difference(of(1.5), of(1)) == (-0.5, None)


@pytest.mark.parametrize(
    "other", [None, Row("piqa acc", 0.5, True, 0.1), of(1, 0, 1), of(1, 0, scored="b"), of(1, 0, scored=None)]
)
def test_other_rows_are_not_compared(other):
    assert difference(of(1, 0), other) is None
    assert difference(other, of(1, 0)) is None


def test_the_line_below_a_row_has_no_value_for_the_first_and_for_models_of_other_rows():
    half, more = of(1, 0, 1, 0), of(1, 1, 1, 0)
    found = Evaluations(
        Evaluation(name, {}, (row, Row("wiki word_perplexity", 9.0, False)))
        for name, row in {"dense": half, "more": more, "same": half, "other": of(1, 0)}.items()
    )
    assert [line.label for line in found.lines] == ["piqa acc", "piqa acc, difference", "wiki word_perplexity"]
    plain, paired, _ = found.lines
    assert plain.cells == ("0.5000 ± 0.1000", "0.7500 ± 0.1000", "0.5000 ± 0.1000", "0.5000 ± 0.1000")
    assert paired.cells == ("-", "+0.2500 ± 0.2500", "0.0000 ± 0.0000", "-")
    assert paired.values == (None, 0.25, 0.0, None) and paired.higher_is_better is True
    assert "<tr><th>piqa acc, difference</th><td>-</td><td>+0.2500 ± 0.2500</td>" in found._repr_html_()
    fewer = Evaluations([found[0], Evaluation("fewer", {}, (of(0),)), Evaluation("none", {})])
    assert [line.label for line in fewer.lines] == ["piqa acc", "wiki word_perplexity"]
    assert Evaluations([Evaluation("dense", {}), found[1]]).lines[1].label == "wiki word_perplexity"
    assert len(Evaluations(found[:1]).lines) == 2
    worse = Evaluations([Evaluation("dense", {}, (of(20, 10),)), Evaluation("worse", {}, (of(0, 5),))])
    assert worse.lines[1].cells == ("-", "-12.50 ± 7.5000")


EARLIER = {"piqa": {"acc": 0.5, "acc_stderr": 0.5}}
SCORES = {"sha256": "ab", "scores": {"acc": [1, 0]}}


def with_rows(**scores):
    return {"piqa": {**EARLIER["piqa"], "rows": {**SCORES, "scores": scores}}, "llama": {"acc": 0.25}}


def evaluation(name, result):
    return Evaluation(name, {"tasks": result}, tuple(TasksMetric().rows(result)))


def test_the_values_of_tasks_are_numbers_and_the_scores_of_rows_are_beside_them():
    one = evaluation("dense", with_rows(acc=[1, 0]))
    assert one.tasks == {**EARLIER, "llama": {"acc": 0.25}} and one.task_rows == {"piqa": SCORES}
    plain = one.as_json()
    assert plain["tasks"] == one.tasks and plain["task_rows"] == one.task_rows and list(plain)[-1] == "task_rows"
    assert [row.scores for row in one.rows] == [(1, 0), None]
    assert [label for label, _ in _figures([plain])] == ["", "piqa acc", "llama acc"]
    assert "task_rows" not in evaluation("dense", EARLIER).as_json()


def test_the_page_of_a_file_of_results_has_the_lines_of_the_command(catalog):
    found = Evaluations(
        evaluation(*pair) for pair in (("dense", with_rows(acc=[1, 0])), ("cut", with_rows(acc=[0, 1])))
    )
    written = json.loads(json_text(found.as_json(), indent=2))
    page = _measurements([(one["name"], one) for one in written], "cut", catalog)
    assert page.lines == tuple(found.lines) and page.lines[1].cells == ("-", "0.0000 ± 1.0000")
    for one in written:
        del one["task_rows"]
    before = _measurements([(one["name"], one) for one in written], "cut", catalog)
    assert [line.label for line in before.lines] == ["piqa acc", "llama acc"]


def test_results_that_were_kept_without_rows_have_no_such_line(tmp_path):
    model = tiny_models.llama()
    subject = MetricSubject("tiny", model, tiny_models.tokenizer(), build_graph(LlamaFamily(), model.config))

    class Kept(TasksMetric):
        name = "tasks"
        now = EARLIER

        def prepare(self):
            pass

        def parts(self):
            return ("piqa",)

        def effort(self, part):
            return 1.0

        def depends_on(self, part):
            return {}

        def texts(self):
            return {}

        def measure_part(self, subject, part):
            return self.now

    def lines(*prints):
        models = [Candidate(str(one), lambda: subject, one) for one in prints]
        found = evaluate(models, [Kept()], store=ResultStore(tmp_path))
        return [line.label for line in found.lines], json.dumps(found.as_json())

    assert lines(1, 2)[0] == ["piqa acc"]
    Kept.now = with_rows(acc=[1, 0])
    labels, written = lines(1, 2, 3)
    assert labels == ["piqa acc", "llama acc"] and written.count("task_rows") == 1
    assert lines(3, 4)[0] == ["piqa acc", "piqa acc, difference", "llama acc"]
    (file, *_) = (file for file in (tmp_path / "evaluations").iterdir() if "rows" in file.read_text())
    assert "[1,0]" in file.read_text()


def test_a_metric_of_a_plugin_has_the_line_too():
    class Own(Metric):
        name = "own"

        def measure(self, subject):
            return {"scores": [0.5, 1.0]}

        def rows(self, result):
            return [Row("own", 0.75, scores=result["scores"])]

    model = tiny_models.llama()
    subject = MetricSubject("tiny", model, None, build_graph(LlamaFamily(), model.config))
    found = evaluate([Candidate("a", lambda: subject), Candidate("b", lambda: subject)], [Own()])
    assert [line.cells for line in found.lines] == [("0.7500", "0.7500"), ("-", "0.0000 ± 0.0000")]


def test_lists_of_numbers_are_on_one_line():
    value = {"a": [1, -2.5, 1e-9], "b": ["[\n1,\n2\n]", 3], "c": [[1, 2], [3]], "d": [], "e": [None, 1], "f": "é"}
    text = json_text(value, indent=2)
    assert json.loads(text) == value and text.endswith("}\n")
    assert '"a": [1,-2.5,1e-09],' in text and "    [1,2],\n" in text and "é" in text
    assert "\\u00e9" in json_text(value, indent=1, ensure_ascii=True)
