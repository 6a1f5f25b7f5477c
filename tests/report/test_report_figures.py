"""The report of a checkpoint: its figures are those of the record, of the shapes and of the files of results; its page
is self-contained, in order, and whole where a section fails."""

import json
import re
import shutil
from dataclasses import asdict, replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny_models

import llmpruner
from llmpruner import DataError, ModelError, ReportSection, load_catalog
from llmpruner.discovery.opening import Opener
from llmpruner.evaluation.metrics import size
from llmpruner.plugins.builtin import llmpruner_report_sections
from llmpruner.pruning.budgets import bytes_per_token
from llmpruner.report.base import Costs, ReportSubject, report_page
from llmpruner.report.evidence import report_subjects
from llmpruner.report.sections import AnswersSection, CostSection, OriginSection, PlanSection, RecoverySection
from llmpruner.report.summary import Pair, sentence
from llmpruner.structure.coupling import CouplingGraph
from llmpruner.structure.kept import restrict
from llmpruner.structure.outcome import Quality
from llmpruner.structure.plan import BaseRef, PruningPlan, Target, cuts_of, structure_of
from llmpruner.values import without_folders


def perplexity(value: float, kl: float) -> dict[str, Any]:
    return {
        "perplexity": value, "nll_per_token": 3.0, "bits_per_byte": 1.0, "tokens": 4096, "windows": 16, "window": 256,
        "text_sha256": "5" * 64, "kl_per_token": kl, "top1_agreement": None, "text": "wikitext2", "others": {},
    }  # fmt: skip


EVALUATED = {
    "dense": {"perplexity": perplexity(20.0, 0.0)},
    "small": {"perplexity": perplexity(30.0, 0.4)},
    "smaller": {"perplexity": perplexity(50.0, 0.9)},
    "worse": {"perplexity": perplexity(60.0, 1.1)},
}
"""Model → what ``evaluate --json`` writes. ``worse`` has the size of ``small``."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """``dense``, pruned by 20 % with a repair (``small``) and without (``worse``), and by 40 % (``smaller``)."""
    folder = tmp_path_factory.mktemp("report")
    tiny_models.llama(layers=3).save_pretrained(folder / "dense")
    tiny_models.tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(
        "The quick brown fox jumps over the lazy dog, and Paris is the capital of France. " * 20
    )
    text = {"calibration": str(folder / "text.txt"), "samples": 8, "length": 24}
    load = llmpruner.LoadSettings(dtype="float32")
    llmpruner.prune(folder / "dense", ratio=0.2, output=folder / "small", load=load, **text)
    llmpruner.prune(folder / "dense", ratio=0.2, importance="l1", output=folder / "worse")
    llmpruner.prune(folder / "dense", ratio=0.4, importance="l1", output=folder / "smaller")
    return folder


def evaluated(places: Path, *names: str) -> list[dict[str, Any]]:
    return [{"name": str(places / name), **EVALUATED[name]} for name in ("dense", *names)]


def benched(places: Path, name: str) -> dict[str, Any]:
    """What ``bench --json`` writes of ``dense`` and another model."""

    def rate(value: float, speedup: float, ideal: float) -> dict[str, Any]:
        around = {"low": 0.0, "high": 0.0, "runs": 3, "lower_quartile": value - 1, "upper_quartile": value + 1}
        return {
            "tokens_per_second": {"median": value, **around}, "speedup": {"median": speedup, **around}, "ideal": ideal,
            "share_of_ideal": speedup / ideal,
        }  # fmt: skip

    models = [
        {"name": str(places / "dense"), "prefill": rate(500, 1, 1), "decode": rate(20, 1, 1)},
        {"name": str(places / name), "prefill": rate(550, 1.1, 1.2), "decode": rate(25, 1.25, 1.5)},
    ]
    case = {"batch": 1, "prompt_tokens": 128, "models": models}
    return {"runtime": "transformers", "settings": {}, "new_tokens": 16, "rounds": 3, "cases": [case]}


def page_of(folder: Path, checkpoints: list[Path], *results: Any) -> tuple[str, dict[str, str]]:
    """The page about ``checkpoints``, in ``folder``, and its sentences. No warnings."""
    files = [folder / f"{number}.json" for number in range(len(results))]
    for file, content in zip(files, results, strict=True):
        file.write_text(json.dumps(content))
    made = llmpruner.write_report(checkpoints, folder / "page.html", results=files)
    assert made.warnings == ()
    return made.path.read_text(encoding="utf-8"), dict(made.sentences)


@pytest.fixture(scope="module")
def small(places):
    (subject,) = report_subjects([places / "small"], [], Opener(load_catalog()))
    return subject


@pytest.fixture(scope="module")
def page(places, tmp_path_factory):
    """The page about one checkpoint, and its sentences."""
    folder = tmp_path_factory.mktemp("page")
    return page_of(folder, [places / "small"], evaluated(places, "small"), benched(places, "small"))


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", html.partition("<main>")[2])))


def test_the_record_tells_the_fits_of_every_layer(small):
    (work,) = small.record["work"]
    assert {fit["parameter"] for fit in work["fits"]} == {f"model.layers.{n}.mlp.down_proj.weight" for n in range(3)}
    for fit in work["fits"]:
        assert list(fit) == ["parameter", "slot", "rows", "ridge", "before", "after"]
        assert fit["rows"] == 8 * 24 and 0 < fit["after"] <= fit["before"]
        assert (fit["ridge"] is None) == (fit["after"] == fit["before"])
    assert any(fit["after"] < fit["before"] for fit in work["fits"])


def test_costs_are_those_of_the_model(places, small, tmp_path):
    loaded = llmpruner.load(places / "small")
    own, dense = small.costs, small.dense
    cache = sum(bytes_per_token(loaded.network, loaded.graph))
    files = [place / "model.safetensors" for place in (places / "small", places / "dense")]
    assert [own.file_bytes, dense.file_bytes] == [file.stat().st_size for file in files]
    assert 0 < own.q4_bytes < dense.q4_bytes < dense.weight_bytes
    assert asdict(size(loaded.network, loaded.graph)).items() <= asdict(own).items()
    assert own.cache_bytes == dense.cache_bytes == cache
    removed = 1 - own.decoder_parameters / dense.decoder_parameters
    made = llmpruner.write_report(places / "small", tmp_path / "page.html")
    assert removed > 0 and f"{removed:.1%} of the decoder's parameters are gone" in made.sentences["small"]
    quality = Quality(**small.record["work"][-1]["quality"])
    assert made.sentences["small"].endswith(f"); {quality}.") and str(quality).startswith("KL ")
    assert f"Right after the cut: {quality}." in made.path.read_text(encoding="utf-8")
    plain = llmpruner.write_report(places / "worse", tmp_path / "page.html")
    assert plain.sentences["worse"].endswith("its quality was not measured.")


@pytest.mark.parametrize(("training", "words"), [
    ({"validation": [(0, 3.0), (2, 2.5)], "best_step": 2}, "Recovery helped: held-out loss 3.000 → 2.500."),
    (
        {"validation": [(0, 3.0), (2, 3.5)], "best_step": 0},
        "did not help and was undone: the loss went from 3.0000 to",
    ),
    ({"validation": []}, "was not measured, as no rows were held out: loss 4.000 → 1.000."),
    ({"validation": [(0, 3.0), (2, 1.0)], "best_step": 2, "held_out": False}, "was not measured, as no rows were"),
])  # fmt: skip
def test_a_recovered_model_is_told_to_be_better_only_if_that_was_measured(training, words, small):
    checks = [{"step": step, "loss": loss, "error": 0.1} for step, loss in training["validation"]]
    trained = {"strategy": "lora", "data": "x", "examples": 2, "losses": [4.0, 1.0], **training, "validation": checks}
    trained = {"held_out": True, "best_step": None, **trained}
    cut_again = replace(small, record={**small.record, "recovery": [trained]})
    told = sentence(cut_again)
    assert words not in told and "before it was trained" not in told, "as the last run is a prune"
    recovered = replace(cut_again, runs=(*small.runs, {"command": "recover"}))
    told = sentence(recovered)
    assert words in told
    assert f"<p>{told.partition(', before it was trained. ')[2]}</p>" in unescape(RecoverySection().render(recovered))


def test_the_page_has_the_figures_of_the_files(places, page):
    html, sentences = page
    shown = text_of(html)
    for text in ("20.00", "30.00", "0.4000", "MACs per token", "KV cache per token", "1.25", "(quartiles)"):
        assert text in shown, text
    assert "perplexity on wikitext2 went from 20.00 to 30.00 (+50%)" in sentences["small"]
    assert "it decodes 1.25 times as fast, where its size allows 1.50" in sentences["small"]
    assert "llmpruner prune dense" in shown
    assert "ratio 0.2, calibration text.txt, samples 8, length 24, dtype float32 Machine" in shown
    stages = json.loads((places / "small" / "run.json").read_text())["stages"]
    assert [stage["name"] for stage in stages][-3:] == ["compensation", "cut", "saving"]
    assert all(stage["peak_bytes"] > 1e6 and stage["seconds"] >= 0 for stage in stages)


def test_perplexity_of_other_tokens_is_told_of_those_of_the_dense_model(places, page, tmp_path):
    results = evaluated(places, "small")
    results[1]["perplexity"] = {**results[1]["perplexity"], "bits_per_byte": 1.2}  # a fifth more tokens
    html, sentences = page_of(tmp_path, [places / "small"], results)
    expected = f"perplexity on wikitext2 (per token of the dense model) went from 20.00 to {30**1.2:.2f}"
    assert expected in sentences["small"]
    assert "the tokens differ between models: compare bits per byte" in text_of(html)
    assert "compare bits per byte" not in text_of(page[0])


def test_tokens_that_go_are_in_the_record_and_on_the_page(places, tmp_path):
    text = {"calibration": str(places / "text.txt"), "samples": 8, "length": 24}
    settings = {"vocabulary": {"tokens": 288}}
    made = llmpruner.prune(places / "dense", kinds="vocabulary", settings=settings, output=tmp_path / "fewer", **text)
    (work,) = json.loads((tmp_path / "fewer" / "llmpruner.json").read_text())["work"]
    assert made.outcome.as_json()["tokens"]["after"] == work["tokens"]["after"] == 288
    assert work["tokens"]["texts"]["held_out"]["tokens"] == 24
    shown = text_of(llmpruner.write_report(tmp_path / "fewer", tmp_path / "page.html").path.read_text())
    assert "whole model 288 of 300 Tokens that go Tokens of Such as Go Of Share" in shown
    assert "all 288 stay 12 300 4.00%" in shown and "vocabulary.tokens 288 Machine" in shown


def test_figures_that_are_shown_alike_did_not_change():
    assert Pair("", 258.401, 258.399, "{:.2f}".format).change == "did not change (258.40)"


def test_the_page_loads_nothing_and_names_its_regions(page):
    html, _ = page
    assert not re.search(r"<(script|link|img|iframe)\b|https?://|@import|url\(", html)
    assert "default-src 'none'" in html
    assert html.count('class="scroll') == html.count('role="region"') > 3
    links = set(re.findall(r'href="#([^"]+)"', html))
    assert links and links <= set(re.findall(r'<section id="([^"]+)"', html))


def test_several_checkpoints_are_compared(places, tmp_path):
    names = ["small", "smaller", "worse"]
    html, sentences = page_of(tmp_path, [places / name for name in names], evaluated(places, *names))
    assert list(sentences) == names
    table = html.partition('<table class="wide">')[2].partition("</table>")[0]
    rows = {row[0]: row for row in (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in table.split("<tr>")[2:])}
    assert {name: row[6] for name, row in rows.items()} == {
        "dense": "20.00", "small": "30.00", "smaller": "50.00", "worse": "60.00"
    }  # fmt: skip
    assert [rows[name][1] for name in ("small", "worse")] == ["best", "l1"]
    assert re.search(r"<li><b>smaller</b> is as good as the dense model on \S+ \(\+0% bits per byte\)\.</li>", html)
    assert "small and smaller have rings: no other pruned model is as small with a lower perplexity" in html
    assert html.count('class="ring"') == 2 and "<script" not in html
    assert html.count('<details class="one">') == 3


def test_answers_of_several_checkpoints_stand_together(small):
    def asked(subject, **texts):
        answers = tuple({"name": name, "prompt": "Why?", "text": text} for name, text in texts.items())
        return replace(subject, answers=(answers,))

    first = asked(small, dense="Because.", small="So.", between="No.")
    second = asked(replace(small, name="other"), dense="Because.", other="Well.")
    html = AnswersSection().compare([first, second])
    assert re.findall(r"<p>(.*?)</p>", html) == ["Because.", "So.", "Well."] and html.count("Why?") == 1
    assert AnswersSection().compare([small]) is None


def test_perplexities_on_other_texts_are_not_compared(places, tmp_path):
    first, second = evaluated(places, "small"), evaluated(places, "smaller")
    for result in second:
        result["perplexity"] = {**result["perplexity"], "text": "c4", "text_sha256": "6" * 64, "perplexity": 9.0}
    html, _ = page_of(tmp_path, [places / "small", places / "smaller"], first, second)
    assert ">30.00</td>" in html and ">9.00 on c4</td>" in html and html.count('class="ring"') == 1


def test_figures_are_next_to_the_dense_model_whichever_was_named_first(places, tmp_path):
    bench, results = benched(places, "small"), evaluated(places, "small", "smaller")
    dense, small = bench["cases"][0]["models"]
    dense["decode"]["ideal"], small["decode"]["ideal"] = 1 / 1.5, 1.0
    bench["cases"][0]["models"] = [small, dense]
    for result, kl in zip(results, (0.3, 0.2, 0.0), strict=True):
        result["perplexity"] = {**result["perplexity"], "kl_per_token": kl}
    html, sentences = page_of(tmp_path, [places / "small", places / "smaller"], bench, results[::-1])
    assert "it decodes 1.25 times as fast, where its size allows 1.50" in sentences["small"]
    assert ">Perplexity</th>" in html and ">KL</th>" not in html


def test_checkpoints_of_one_name_are_told_apart(places, tmp_path):
    """As the outputs of two runs of a recipe are."""
    shutil.copytree(places / "smaller", tmp_path / "small")
    both, results = [places / "small", tmp_path / "small"], [{"name": "dense", **EVALUATED["dense"]}]
    for place, like in zip(both, ("small", "smaller"), strict=True):
        results.append({"name": str(place), **EVALUATED[like]})
    html, sentences = page_of(tmp_path, both, results)
    assert list(sentences) == [f"{place.parent.name}/small" for place in both]
    first, second = sentences.values()
    assert "went from 20.00 to 30.00" in first and "went from 20.00 to 50.00" in second
    removed = [re.search(r"([\d.]+%) of the decoder", sentence)[1] for sentence in (first, second)]
    assert removed[0] != removed[1] and all(f">{share}</td>" in html for share in removed)


def test_folders_of_paths_are_left_out():
    for text, shown in {
        "/x/c4.jsonl": "c4.jsonl", "2*/data/wiki.txt,self": "2*wiki.txt,self", "3*self,1*chat:/a/b.jsonl":
        "3*self,1*chat:b.jsonl", "a/b": "a/b", "https://x.org/y": "https://x.org/y", "C:\\models\\a": "a", "/a": "a",
        "self,1.5*chat:/x/a.jsonl,2*jsonl:C:\\y\\b.jsonl": "self,1.5*chat:a.jsonl,2*jsonl:b.jsonl",
    }.items():  # fmt: skip
        assert without_folders(text) == shown


def test_what_is_no_checkpoint_is_refused(places, tmp_path):
    with pytest.raises(ModelError, match="is neither a pruned checkpoint nor the output of a recipe"):
        llmpruner.write_report(places / "dense", tmp_path / "page.html")


@pytest.mark.parametrize(("results", "message"), [
    ({"a": 1}, "is not "),
    ([{"name": "{small}", "perplexity": {"text": "a.txt"}}], "is not as `evaluate --json`"),
    ([{"name": "{small}", "perplexity": {"perplexity": 10.0, "others": 3}}], "is not as `evaluate --json`"),
    ([{"name": "{small}", "perplexity": {"perplexity": "x"}}], "is not as `evaluate --json`"),
    ([{"name": "/elsewhere/small"}, {"name": "/elsewhere/dense"}], "has no results of .*small; measure the checkpoint"),
])  # fmt: skip
def test_results_that_are_none_are_refused(results, message, places, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(results).replace("{small}", str(places / "small")))
    with pytest.raises(DataError, match=rf"a\.json {message}"):
        llmpruner.write_report(places / "small", tmp_path / "page.html", results=[tmp_path / "a.json"])
    assert not (tmp_path / "page.html").exists()


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
