"""One page from sections: self-contained, in order, and whole where a section fails."""

from __future__ import annotations

import re
from html import escape
from html.parser import HTMLParser

import pytest
from pydantic import Field

from llmpruner import Blocks, ComponentSettings, CoupledGroup, ReportSection, Role, Span
from llmpruner.errors import PlanError
from llmpruner.plugins.builtin import llmpruner_report_sections
from llmpruner.report.base import Costs, Evidence, ReportSubject
from llmpruner.report.cuts import Cell, LayerRow, PlanSection, cut_tables
from llmpruner.report.measured import CostSection
from llmpruner.report.page import report_page
from llmpruner.report.structure import GroupsSection, kind_rows
from llmpruner.structure.coupling import CouplingGraph
from llmpruner.structure.kept import restrict
from llmpruner.structure.plan import (
    BaseRef,
    EstimationRecord,
    PruningPlan,
    SelectionRecord,
    Target,
    cuts_of,
    structure_of,
)

VOID = {"meta", "wbr", "br", "hr", "img", "link"}


class Counting(ReportSection):
    """What a plugin could add."""

    name = "counting"
    summary = "a number"
    order = 15

    class Settings(ComponentSettings):
        start: int = Field(1, description="The first number.")

    settings: Settings

    def render(self, subject):
        return f"<h2>Counting</h2><p class='counting'>{self.settings.start} of {escape(subject.title)}</p>"

    def style(self):
        return ".counting { color: var(--dim); }"


class Parser(HTMLParser):
    """Raises for a tag that is closed in the wrong place, and collects what was opened."""

    def __init__(self, html):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def sections(*more):
    return [*(cls() for cls in llmpruner_report_sections()), *more]


def plan_of(loaded, kept):
    """A plan that keeps ``kept``; how it came about does not matter here."""
    plan = PruningPlan(
        base=BaseRef(model="tiny", structure=structure_of(loaded.graph)),
        family="llama",
        estimation=EstimationRecord(criterion="l1", reduction="sum"),
        selection=SelectionRecord(kinds=("mlp",), layers=(0,), allocation="uniform"),
        target=Target(by="units", amount=0.5),
        seed=0,
        cuts=cuts_of(loaded.graph, kept),
    )
    return plan.model_dump(mode="json")


@pytest.fixture
def pruned(gqa):
    """Layers 1 and 2 alike, layer 3 otherwise, layer 0 whole; one head of layer 3; some hidden channels."""
    kept = {"layers.1.mlp": range(40), "layers.2.mlp": range(40), "layers.3.mlp": range(8)}
    kept |= {"layers.3.attention": [0, 2, 3], "hidden": range(48)}
    return ReportSubject("a <model>", restrict(gqa.graph, kept), {"plans": [plan_of(gqa, kept)]})


def test_the_page_is_well_formed_and_needs_nothing_from_the_network(pruned):
    page = report_page(pruned, sections(Counting()))
    assert page.warnings == () and page.html.startswith("<!doctype html>")
    assert not {"script", "link", "img"} & set(Parser(page.html).seen)
    assert not re.search(r"https?://|@import|url\(", page.html)
    assert "<h1>a &lt;model&gt;</h1>" in page.html and "<model>" not in page.html
    assert "prefers-color-scheme: dark" in page.html and "@media print" in page.html
    assert 'name="viewport"' in page.html


def test_sections_stand_in_their_order_with_their_styles(pruned):
    html = report_page(pruned, sections(Counting(start=7))).html
    titles = re.findall(r"<h2>([^<]*)</h2>", html)
    assert titles == ["Coupled groups", "Counting", "What was cut", "Coupled axes of decoder layer 2 of 4"]
    head, _, body = html.partition("</head>")
    assert ".counting {" in head and "7 of a &lt;model&gt;" in body


def test_a_section_that_fails_is_left_out_and_named(pruned):
    class Raises(Counting):
        name = "raises"

        def render(self, subject):
            raise ValueError("no\nmore")

    class Wrong(Counting):
        name = "wrong"

        def render(self, subject):
            return 3

    page = report_page(pruned, [Raises(), Wrong(), GroupsSection()])
    assert page.warnings == (
        "report section raises is left out: no",
        "report section wrong is left out: it returned int, expected HTML text or None",
    )
    assert re.findall(r"<h2>([^<]*)</h2>", page.html) == ["Coupled groups"]


def test_groups_by_kind_with_their_share():
    shapes = {"layers.0.up": (6, 8), "layers.1.up": (4, 8), "layers.0.norm": (8,), "head": (10, 8)}
    groups = (
        CoupledGroup("layers.0.mlp", "mlp", 6, (Span("layers.0.up", 0, Role.PRODUCES, Blocks(6)),), layer=0),
        CoupledGroup("layers.1.mlp", "mlp", 4, (Span("layers.1.up", 0, Role.PRODUCES, Blocks(4)),), layer=1),
        CoupledGroup("hidden", "hidden", 8, (Span("layers.0.norm", 0, Role.NORM, Blocks(8)),)),
    )
    graph = CouplingGraph(groups, shapes, "layers")
    assert [tuple(row) for row in kind_rows(graph)] == [
        ("mlp", "2", "4 to 6", "8", f"{80 / 88:.1%}"),
        ("hidden", "1", "8", "1", "all"),
    ]
    html = GroupsSection().render(ReportSubject("", graph))
    assert "168 parameters, 88 of them in" in html
    assert '<tr><th scope="row">mlp</th><td class="number">2</td><td class="number">4 to 6</td>' in html


def test_the_plan_shows_kept_of_total_for_layers_and_kinds(pruned):
    (table,) = cut_tables(pruned.record)
    assert (table.whole, table.kinds) == ({"hidden": Cell(48, 64)}, ("mlp", "attention"))
    assert table.rows == (
        LayerRow(1, 2, (Cell(40, 96), None)),
        LayerRow(3, 3, (Cell(8, 96), Cell(3, 4))),
    )
    html = PlanSection().render(pruned)
    assert "<li>hidden: 48 of 64</li>" in html and '<th scope="row">1–2</th>' in html
    assert '<td class="kept" style="--share: 75.0%">3 of 4</td>' in html and "<td>all</td>" in html


def test_removed_layers_are_listed_and_further_plans_have_tables_of_their_own(gqa):
    first, second = {"layers": [0, 3]}, {"layers.0.mlp": range(9)}
    record = {"plans": [plan_of(gqa, first), plan_of(gqa, second)]}
    html = PlanSection().render(ReportSubject("", gqa.graph, record))
    assert "<li>layer: 2 of 4; removed: 1, 2</li>" in html
    assert html.index("Plan 1 of 2") < html.index("removed: 1, 2") < html.index("Plan 2 of 2") < html.index("9 of 96")


def test_without_plans_there_is_no_section_and_a_damaged_one_is_a_warning(gqa):
    assert PlanSection().render(ReportSubject("", gqa.graph)) is None
    subject = ReportSubject("", gqa.graph, {"plans": [{"cuts": 3}]})
    with pytest.raises(PlanError):
        cut_tables(subject.record)
    page = report_page(subject, sections())
    (warning,) = page.warnings
    assert warning.startswith("report section plan is left out: plan 1 of the record is not a pruning plan")
    assert len(re.findall("<h2>", page.html)) == 2


def test_costs_of_a_model_without_keys_and_values():
    """Nothing can be removed of a cache that does not grow (Mamba); it was a division by zero."""
    dense, own = (Costs(n, n, 4 * n, n, 512, cache_bytes=0) for n in (100, 75))
    subject = ReportSubject("m", CouplingGraph((), {}, "layers"), {}, Evidence("m", dense, own))
    section = CostSection().render(subject)
    row = re.search(r"KV cache per token, bytes</th>(.*)", section)
    assert re.findall(r">([^<>]+)<", row[1]) == ["0", "0", "–"]
    assert section.count("25.0%") == 4
