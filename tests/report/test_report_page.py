"""One page from sections: self-contained, in order, and whole where a section fails."""

import re
from html.parser import HTMLParser

import pytest

from llmpruner import ReportSection
from llmpruner.plugins.builtin import llmpruner_report_sections
from llmpruner.report.base import Costs, ReportSubject, report_page
from llmpruner.report.sections import CostSection, OriginSection, PlanSection
from llmpruner.structure.coupling import CouplingGraph
from llmpruner.structure.kept import restrict
from llmpruner.structure.plan import BaseRef, PruningPlan, Target, cuts_of, structure_of

COSTS = Costs(100, 80, 400, 100, 512, cache_bytes=8)
VOID = {"meta", "wbr", "br", "hr", "img", "link"}


class Parser(HTMLParser):
    """Raises for a tag that is closed in the wrong place."""

    def __init__(self, html):
        super().__init__()
        self.open = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def plan_of(loaded, kept):
    """A plan that keeps ``kept``; how it came about does not matter here."""
    selected = {"kinds": ("mlp",), "layers": (0,), "allocation": "uniform"}
    return PruningPlan(
        base=BaseRef(model="tiny", structure=structure_of(loaded.graph)), family="llama", seed=0,
        estimation={"criterion": "l1", "reduction": "sum"}, selection=selected, target={"by": "units", "amount": 0.5},
        cuts=cuts_of(loaded.graph, kept),
    )  # fmt: skip


def subject_of(graph, *plans):
    record = {"plans": [plan.model_dump(mode="json") for plan in plans]}
    return ReportSubject("a <model>", "small", graph, record, plans, COSTS, COSTS)


@pytest.fixture
def pruned(gqa):
    """Layers 1 and 2 alike, layer 3 otherwise, layer 0 whole; one head of layer 3; some hidden channels."""
    kept = {"layers.1.mlp": range(40), "layers.2.mlp": range(40), "layers.3.mlp": range(8)}
    kept |= {"layers.3.attention": [0, 2, 3], "hidden": range(48)}
    return subject_of(restrict(gqa.graph, kept), plan_of(gqa, kept))


def test_the_page_is_well_formed_with_sections_in_their_order(pruned):
    html, warnings = report_page([pruned], [cls() for cls in reversed(llmpruner_report_sections())])
    assert warnings == () and html.startswith("<!doctype html>")
    Parser(html)
    assert "<h1>a &lt;model&gt;</h1>" in html and "<model>" not in html
    assert "prefers-color-scheme: dark" in html and "@media print" in html and 'name="viewport"' in html
    titles = re.findall(r"<h2>([^<]*)</h2>", html)
    assert titles == ["Quality", "Cost", "What was cut", "How it was made"]


def test_a_section_that_fails_is_left_out_and_named(pruned):
    def section(name, render):
        return type(name, (ReportSection,), {"name": name, "render": render})()

    wrong = section("wrong", lambda self, subject: 3)
    html, warnings = report_page([pruned], [section("raises", lambda self, subject: 1 / 0), wrong, PlanSection()])
    assert warnings == (
        "report section raises is left out: division by zero",
        "report section wrong is left out: it returned int, expected HTML text or None",
    )
    assert re.findall(r"<h2>([^<]*)</h2>", html) == ["What was cut"]


def test_the_plan_shows_kept_of_total_for_layers_and_kinds(pruned):
    (plan,) = pruned.plans
    rows = [("1-2", "40 of 96", "all", ""), ("3", "8 of 96", "3 of 4", ""), ("whole model", "", "", "48 of 64")]
    assert plan.table() == (("mlp", "attention", "hidden"), rows)
    html = PlanSection().render(pruned)
    assert '<th scope="row">1-2</th><td class="number">40 of 96</td>' in html


def test_removed_layers_are_listed_and_further_plans_have_tables_of_their_own(gqa):
    plans = plan_of(gqa, {"layers": [0, 3]}), plan_of(gqa, {"layers.0.mlp": range(9)})
    html = PlanSection().render(subject_of(gqa.graph, *plans))
    assert html.index("Plan 1 of 2") < html.index("2 of 4 (without 1-2)")
    assert html.index("(without 1-2)") < html.index("Plan 2 of 2") < html.index("9 of 96")


def test_costs_of_a_model_without_keys_and_values():
    """Nothing can be removed of a cache that does not grow (Mamba); it was a division by zero."""
    dense, own = (Costs(n, n, 4 * n, n, 512, cache_bytes=0) for n in (100, 75))
    section = CostSection().render(ReportSubject("m", "m", CouplingGraph((), {}, "layers"), {}, (), dense, own))
    row = re.search(r"KV cache per token, bytes</th>(.*)", section)
    assert re.findall(r">([^<>]+)<", row[1]) == ["0", "0", "–"]
    assert section.count("25.0%") == 4


def test_every_way_to_ask_for_an_amount_is_told(gqa):
    for by, amount, words in (
        ("units", 0.25, "25.0% of the units of every group"),
        ("parameters", 38_000, "38,000 parameters to keep"),
        ("tokens", 288, "288 tokens to keep"),
        ("ratio", 0.25, "25.0% of decoder"),
    ):
        plan = plan_of(gqa, {"layers.0.mlp": range(9)}).model_copy(update={"target": Target(by=by, amount=amount)})
        assert f"<dt>Asked for</dt><dd>{words}</dd>" in OriginSection().render(subject_of(gqa.graph, plan))
