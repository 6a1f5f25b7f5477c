"""Tables in docs are those that the benchmarks make of the committed results."""

import json
from statistics import fmean

import pytest

from benchmarks import (
    choose,
    criteria,
    gguf_sizes,
    quality,
    recovery,
    seeds,
    sizes,
    speed,
    support_matrix,
    tasks,
    vocabulary,
)
from benchmarks.measure import marks

DEMO = next(iter(quality.MODELS))
TABLES = {"criteria": criteria, "vocabulary": vocabulary, "sizes": sizes, "speed": speed, "gguf-sizes": gguf_sizes}


@pytest.mark.parametrize("name, module", TABLES.items())
def test_a_page_shows_what_was_measured(name, module):
    begin, end = marks(name)
    table = module.table(json.loads(module.RESULTS.read_text(encoding="utf-8")))
    assert module.PAGE.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0].strip() == table


@pytest.mark.parametrize(
    "name, module", {"samples": seeds, "choose": choose, "minutes": recovery, "tasks": tasks}.items()
)
def test_a_table_is_that_of_the_rows(name, module):
    begin, end = marks(name)
    page = module.PAGE.read_text(encoding="utf-8")
    assert page.partition(begin)[2].partition(end)[0].strip() == module.table(module.read())


def test_readme_says_what_fewer_samples_cost():
    many, few = ([row for row in seeds.read() if row["model"] == DEMO and row["samples"] == n] for n in (256, 96))
    assert min(len(many), len(few)) >= 3
    time, divergence = (
        fmean(value(row) for row in few) / fmean(value(row) for row in many)
        for value in (lambda row: row["seconds"], lambda row: fmean(row["kl"].values()))
    )
    said = f"takes {time:.0%} of the time and is [{divergence - 1:.0%} further]".replace("%", " %")
    assert said in " ".join((quality.ROOT / "README.md").read_text(encoding="utf-8").split())


def test_readme_says_what_is_kept_on_tasks():
    rows = {(row["model"].split("-")[2], row["name"]): row for row in tasks.read()}

    def kept(size, name, without=""):
        return f"{tasks.kept(rows[size, name], rows[size, 'dense'], without):.1%}"

    names = ("best, recovered", "best", "Wanda-sp", "LLM-Pruner", "best, fewer tokens")
    recovered, best, wanda, paper, trimmed = (kept("0.5B", name, "boolq") for name in names)
    readme = " ".join((quality.ROOT / "README.md").read_text(encoding="utf-8").split())
    large = f"two cores, keeps {kept('1.5B', 'best, recovered')} on BoolQ, PIQA, ARC-easy and OpenBookQA;"
    before = f"`best` keeps {best} of the 0.5B, Wanda-sp {wanda} and the paper's method {paper};"
    tokens = f"fewer tokens and about as many parameters, {trimmed}."
    for said in (large, f"the 0.5B keeps {recovered} without BoolQ", before, tokens):
        assert said.replace("%", " %") in readme


def test_written_pages_are_those_of_the_results():
    assert quality.PAGE.read_text(encoding="utf-8") == quality.page(
        quality.read(quality.RESULTS), quality.read(quality.AGAIN)
    )
    assert quality.PICTURE.read_text(encoding="utf-8") == quality.picture(quality.read(quality.RESULTS))
    assert choose.PICTURE.read_text(encoding="utf-8") == choose.picture(choose.read())
    assert support_matrix.PAGE.read_text(encoding="utf-8") == support_matrix.render(support_matrix.read())


def test_figures_in_prose_are_those_of_the_rows():
    done = quality.read(quality.RESULTS)

    def entry(method, shape="uniform"):
        return done[quality.Row(DEMO, method, 0.2, shape, "self-written")]

    best, recovered, free = (
        f"{quality.mean_divergence(entry(*row)):.2f}" for row in (("best",), ("best, recovered",), ("best", "free"))
    )
    larger = list(quality.MODELS)[-1]
    few, more = (done[quality.Row(larger, "best", 0.2, "uniform", "self-written", samples)] for samples in (32, 64))
    figures = {
        "README.md": f"`best` took {entry('best')['seconds'] / 60:.0f} minutes",
        "docs/how-to/recover.md": f"from {best} to {recovered}",
        "docs/concepts/allocation.md": f"{free} instead of {best}",
        "docs/how-to/prune.md": f"is {quality.mean_divergence(few):.2f} instead of {quality.mean_divergence(more):.2f}",
    }
    for page, figure in figures.items():
        assert figure in (quality.ROOT / page).read_text(encoding="utf-8")


def test_readme_names_the_best_and_the_worst_text_of_fewer_tokens():
    rows = json.loads(vocabulary.RESULTS.read_text(encoding="utf-8"))["Qwen2.5-Coder-0.5B"]
    readme = " ".join((quality.ROOT / "README.md").read_text(encoding="utf-8").split())

    def more(row, texts):
        """Bits per byte of the texts on which least and most are lost, as README has them."""
        bits, dense = (rows[name]["bits_per_byte"] for name in (row, "dense"))
        shares = sorted((bits[text] / dense[text] - 1, text) for text in texts)
        return " to ".join(f"{share:.0%} ({text})".replace("%", " %") for share, text in (shares[0], shares[-1]))

    kept = [text for text in rows["dense"]["bits_per_byte"] if text != "Chinese"]
    fewer = rows["98,304 tokens, Latin"]
    most = max(fewer["bits_per_byte"][text] / rows["dense"]["bits_per_byte"][text] - 1 for text in kept)
    lost = fewer["bits_per_byte"]["Chinese"] / rows["dense"]["bits_per_byte"]["Chinese"]
    assert f"{fewer['gone']:.1%} of its".replace("%", " %") in readme
    assert f"at most {most:.1%} more bits".replace("%", " %") in readme and f"Chinese takes {lost:.0f} ×" in readme
    assert f"costs {more('a fifth fewer bytes: mlp', kept)} more bits" in readme
    assert f"and {more('a fifth fewer bytes: mlp,vocabulary', kept)} if tokens go too" in readme


def is_in_readme(row):
    return (row.method, row.shape, row.text) == ("best", "uniform", "self-written") and row.samples != 32


@pytest.mark.parametrize("best", [row for row in quality.rows() if is_in_readme(row)], ids=str)
def test_best_is_nearest_on_the_texts_that_readme_says(best):
    rows = quality.read(quality.RESULTS)
    others = [
        entry
        for row, entry in rows.items()
        if (row.model, row.ratio) == (best.model, best.ratio) and not quality.is_own(row)
    ]
    assert others
    another_is_nearer = {
        name
        for name, result in rows[best]["texts"].items()
        if min(other["texts"][name]["kl_per_token"] for other in others) <= result["kl_per_token"]
    }
    assert another_is_nearer == ({"WikiText-2"} if "1.5B" in best.model else set())
