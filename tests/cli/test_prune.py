"""``prune``: the directory that it leaves."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmpruner import load_pruned

FAST = ("--samples", 2, "--set", "prune.length=16")
TAYLOR = ("--importance", "taylor", *FAST)
CHOICES = {
    "l2": ("--importance", "l2", "--set", "prune.reduction=prod"),
    "element2": (*TAYLOR, "--set", "taylor.variant=element2", "--set", "prune.allocation=global", "--shape", "free"),
    "mix": (*TAYLOR, "--set", "taylor.variant=mix", "--set", "prune.reduction=mean", "--steps", 2),
    "vector": (*TAYLOR, "--set", "taylor.variant=vector", "--kinds", "mlp,attention"),
    "hidden": ("--importance", "l2", "--kinds", "hidden"),
    "layer": ("--importance", "l1", "--kinds", "layer"),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_result_loads_and_has_the_size_that_was_printed(run, dense, tmp_path, choice):
    found = run("prune", dense, "--ratio", 0.25, *CHOICES[choice], "-o", tmp_path / "out", "--json").json()
    model = load_pruned(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == found["result"]["parameters_after"]
    assert found["result"]["decoder_removed"] == pytest.approx(0.25, abs=0.02)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(AutoTokenizer.from_pretrained(dense))


def test_an_equal_cut_is_a_stock_model_with_the_rows_that_were_kept(run, dense, tmp_path):
    options = ("--set", "prune.unit_ratio=0.25", "--importance", "l1", "--set", "prune.layers=all")
    found = run("prune", dense, *options, "-o", tmp_path / "out", "--json").json()
    assert found["result"]["checkpoint"] == "stock"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.intermediate_size == 36
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "out"))
    for layer, cut in enumerate(found["plan"]["cuts"].values()):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        rows = [u for run in cut["kept"].split(",") for u in range(int(run.split("-")[0]), int(run.split("-")[-1]) + 1)]
        assert torch.equal(after[name], before[name][rows])
    untouched = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(after[untouched], before[untouched])


def test_replaying_a_plan_gives_the_same_files(run, dense, tmp_path):
    options = ("--ratio", 0.2, "--kinds", "mlp,attention", "--set", "prune.layers=1-3", *FAST)
    assert run("plan", dense, *options, "-o", tmp_path / "plan.json").code == 0
    assert run("prune", dense, *options, "-o", tmp_path / "direct").code == 0
    result = run("prune", dense, "--plan", tmp_path / "plan.json", "-o", tmp_path / "replayed")
    assert result.code == 0 and "trust_remote_code=True" in result.out
    direct, replayed = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("direct", "replayed"))
    for name in ("run.json", "report.html"):
        assert direct.pop(name) and replayed.pop(name), "what differs every time"
    records = [json.loads(files.pop("llmpruner.json")) for files in (direct, replayed)]
    assert records[0] == records[1] and direct == replayed
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(direct)


def test_a_plan_is_compensated_on_its_own_text_only(run, dense, shared, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((shared / "text.txt").read_text())
    options = ("--ratio", 0.2, "--calibration", text, *FAST)
    assert run("plan", dense, *options, "-o", tmp_path / "plan.json").code == 0
    text.write_text(text.read_text().upper())
    result = run("prune", dense, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert result.code == 2 and "is not the text that this plan was made with" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("budget", "label"), [("macs", "MACs per token"), ("kv-cache", "KV-cache bytes per token")])
def test_a_ratio_of_any_budget_is_met_and_shown(run, dense, tmp_path, budget, label):
    context = ("--set", "macs.context=32") if budget == "macs" else ()
    options = ("--ratio", 0.25, "--budget", budget, *context, "--kinds", "attention,mlp", "--shape", "free")
    more = ("--set", "prune.layers=all", "--importance", "l1", "-o", tmp_path / "plan.json", "--json")
    found = run("plan", dense, *options, *more).json()
    target, cost = found["plan"]["target"], found["result"]["budget"]
    assert target["budget"] == budget and target.get("settings") == ({"context": 32} if context else None)
    assert 1 - cost["after"] / cost["before"] == pytest.approx(0.25, abs=0.005)
    replayed = run("prune", dense, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert replayed.code == 0 and label in replayed.out
