"""``discover``, ``plan`` and ``prune``: what is found, what would be removed, and the directory that is left."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmpruner import PruningPlan

DECODER, TOTAL, MLP_UNIT = 30_976, 50_208, 96


def test_discover_proves_its_groups(run, dense):
    found = run("discover", dense, "--verify", "--json").json()
    assert (found["family"], found["layers"]) == ("llama", 4)
    assert (found["parameters"], found["decoder_parameters"]) == (TOTAL, DECODER)
    verdicts = {v["kind"]: v["verdict"] for v in found["verdicts"]}
    assert verdicts == dict.fromkeys(("attention", "mlp", "query", "hidden", "layer", "vocabulary"), "verified")
    mlp = next(group for group in found["groups"] if group["kind"] == "mlp" and group["layer"] == 2)
    assert (mlp["units"], mlp["parameters_per_unit"]) == (48, MLP_UNIT)
    assert {(span["parameter"].split(".")[-2], span["axis"]) for span in mlp["spans"]} == {
        ("gate_proj", 0), ("up_proj", 0), ("down_proj", 1),
    }  # fmt: skip


def test_a_number_of_parameters_is_met(run, dense):
    for text, number in (("45K", 45_000), ("0.0412M", 41_200), ("43210", 43_210)):
        free = ("--shape", "free", "--importance", "l1", "--json")
        found = run("plan", dense, "--set", f"prune.target_params={text}", *free).json()
        assert found["plan"]["target"] == {"by": "parameters", "amount": number}
        assert abs(found["result"]["parameters_after"] - number) <= MLP_UNIT / 2


@pytest.mark.parametrize(("kind", "row", "told"), [
    ("mlp", "0-3", "uniform widths give"), ("vocabulary", "whole model", "whole units give"),
])  # fmt: skip
def test_the_amount_is_told_of_the_budget(run, dense, shared, kind, row, told):
    text = ("--calibration", shared / "text.txt", "--samples", 8, "--set", "prune.length=16")
    command = ("plan", dense, "--ratio", 0.013, "--budget", "parameters", "--kinds", kind, *text)
    result = run(*command, "--json").json()["result"]
    shown = run(*command)
    removed = 1 - result["parameters_after"] / result["parameters_before"]
    assert f"asked for 1.3%; {told} {removed:.1%}\n" in shown.err
    assert "load everywhere" not in shown.err, "a hybrid of uniform widths may need a shim"
    assert f"\u2502 {row} " in shown.out
    assert ("tokens" in result) == ("held-out text" in shown.out) == (kind == "vocabulary")


def test_a_share_of_units_goes_from_the_chosen_layers(run, dense):
    options = ("--importance", "l1", "--set", "prune.layers=0,2-3", "--json")
    plan = PruningPlan.model_validate(run("plan", dense, "--set", "prune.unit_ratio=0.25", *options).json()["plan"])
    assert [(cut.layer, len(cut.kept)) for cut in plan.cuts.values()] == [(0, 36), (2, 36), (3, 36)]


FAST = ("--samples", 2, "--set", "prune.length=16")


def test_an_equal_cut_is_a_stock_model_with_the_rows_that_were_kept(run, dense, tmp_path):
    options = ("--set", "prune.unit_ratio=0.25", "--importance", "l1", "--set", "prune.layers=all")
    found = run("prune", dense, *options, "-o", tmp_path / "out", "--json").json()
    assert found["result"]["checkpoint"] == "stock" and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(AutoTokenizer.from_pretrained(dense))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.intermediate_size == 36
    assert sum(p.numel() for p in model.parameters()) == found["result"]["parameters_after"]
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "out"))
    for cut in PruningPlan.model_validate(found["plan"]).cuts.values():
        name = f"model.layers.{cut.layer}.mlp.up_proj.weight"
        assert torch.equal(after[name], before[name][list(cut.kept)])


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
