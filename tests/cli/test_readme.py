"""Every command and every piece of Python in the README runs, in its order; and ``demo``, on a small model."""

import json
import re
import shlex
from html import unescape
from pathlib import Path

import pytest
import yaml

from llmpruner.recipes import DemoRecipe

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)


def commands() -> list[list[str]]:
    lines = [line for language, block in BLOCKS if not language for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("llmpruner ")]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_readme_runs(run, shared, dense, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text((shared / "text.txt").read_text())
    told = commands()
    # Otherwise the dense model writes 256 samples, and 512 rows.
    less = {"prune": ("--samples", "4"), "recover": ("--data", str(shared / "data.jsonl"), "--max-steps", "1")}
    assert [words[1] for words in told] == ["prune", "recover", "evaluate"]
    for words in told:
        outcome = run(*(str(dense) if word == "MODEL" else word for word in words[1:]), *less.get(words[1], ()))
        assert outcome.code == 0, f"{' '.join(words)}: {outcome.err}"
    use, plugin = (block for language, block in BLOCKS if language == "python")
    names: dict = {}
    exec(use.replace('"demo"', repr(str(dense))), names)
    assert names["model"].outcome.decoder_removed > 0
    exec(plugin, names)
    assert names["llmpruner_model_families"]() == [names["Heron"]]


@pytest.fixture
def small(monkeypatch, dense, tmp_path):
    recipe = yaml.safe_load(DemoRecipe().text())
    recipe["model"] = str(dense)
    steps = recipe["steps"]
    steps[0]["prune"].update(samples=4, settings={"vocabulary": {"tokens": 280}})
    steps[1]["prune"]["samples"] = 4
    data = steps[2]["recover"]["data"].replace("self-text:192", "self-text:8")
    steps[2]["recover"].update(data=data, max_steps=2, cutoff=512)
    steps[3]["evaluate"]["settings"]["perplexity"]["tokens"] = 1024
    for step in steps[4:7]:
        step["generate"]["max_new_tokens"] = 8
    steps[7]["bench"].update(prompt=32, rounds=1)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(DemoRecipe, "path", tmp_path / "small.yaml")
    return dense


@pytest.mark.slow
def test_the_demo_shows_what_prune_does_by_default(run, small, tmp_path):
    shown = run("demo", "-o", tmp_path / "demo", "--ratio", 0.3, "--seed", 3)
    assert shown.code == 0, shown.err
    assert {"pruned", "recovered"} < {path.name for path in (tmp_path / "demo").iterdir()}
    record = json.loads((tmp_path / "demo" / "recovered" / "llmpruner.json").read_text())
    tokens, plan = record["plans"]
    assert set(tokens["cuts"]) == {"vocabulary"}
    assert plan["compensation"]["name"] == "refit" and plan["seed"] == 3 and plan["target"]["amount"] == 0.3
    assert len(record["recovery"][0]["losses"]) == 2
    header = next(line for line in shown.out.splitlines() if "┃" in line and "dense" in line).split()
    assert [word for word in header if word.isalpha()] == ["dense", "pruned", "recovered"]
    titles = ["Units kept", "“What is the", "“Why do we", "“Give three", "Prefill", "Decoding", "Next, with"]
    places = [shown.out.index(title) for title in titles]
    assert places == sorted(places)
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    sentence = next(line for line in shown.out.splitlines() if "of the decoder's parameters are gone" in line)
    assert "perplexity on pydoc (per token of the dense model) went from" in sentence
    assert sentence.removeprefix("recovered: ") in unescape(page)
    for title in ("Quality", "Answers", "Cost", "What was cut", "Recovery"):
        assert f">{title}</h2>" in page
    assert "3*self,1*chat:instructions.jsonl." in page
    assert run("generate", tmp_path / "demo" / "pruned", "-p", "The fox", "--max-new-tokens", 2).code == 0
    again = run("demo", "-o", tmp_path / "demo", "--ratio", 0.3, "--seed", 3)
    assert again.code == 0 and again.err.count("done before with the same inputs, skipped") == 8
