"""``discover`` and ``plan``: what is found, and what would be removed."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

DECODER, TOTAL, MLP_UNIT = 30_976, 50_208, 96


def test_discover_as_json(run, dense):
    found = run("discover", dense, "--json").json()
    assert (found["family"], found["layers"]) == ("llama", 4)
    assert (found["parameters"], found["decoder_parameters"]) == (TOTAL, DECODER)
    groups = {group["name"]: group for group in found["groups"]}
    kinds = {group["kind"] for group in found["groups"]}
    assert {"mlp", "attention", "query", "hidden", "layer"} <= kinds
    mlp = next(group for group in groups.values() if group["kind"] == "mlp" and group["layer"] == 2)
    assert (mlp["units"], mlp["parameters_per_unit"]) == (48, MLP_UNIT)
    assert {(span["parameter"].split(".")[-2], span["axis"]) for span in mlp["spans"]} == {
        ("gate_proj", 0), ("up_proj", 0), ("down_proj", 1),
    }  # fmt: skip


def test_target_params(run, dense):
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
    assert f"\u2502 {row} " in shown.out
    assert ("tokens" in result) == ("held-out text" in shown.out) == (kind == "vocabulary")


def test_unit_ratio_on_chosen_layers(run, dense):
    options = ("--importance", "l1", "--set", "prune.layers=0,2-3", "--json")
    cuts = run("plan", dense, "--set", "prune.unit_ratio=0.25", *options).json()["plan"]["cuts"]
    assert [cut["layer"] for cut in cuts.values()] == [0, 2, 3]
    assert all(kept(cut) and len(kept(cut)) == 36 for cut in cuts.values())


def test_steps_measure_again(run, dense, shared):
    plans = {}
    for steps in (1, 3):
        free = ("--shape", "free", "--set", "prune.allocation=global")
        options = ("--ratio", 0.4, "--steps", steps, "--calibration", shared / "text.txt", *free)
        found = run("plan", dense, *options, "--samples", 4, "--set", "prune.length=16", "--json").json()
        assert abs(found["result"]["decoder_removed"] * DECODER - 0.4 * DECODER) <= MLP_UNIT / 2
        plans[steps] = found["plan"]
    assert plans[3]["selection"]["steps"] == 3
    assert plans[1]["cuts"] != plans[3]["cuts"]


def test_the_plan_file_is_what_json_shows(run, dense, tmp_path):
    options = ("--ratio", 0.2, "--importance", "random", "--set", "prune.seed=7")
    shown = run("plan", dense, *options, "-o", tmp_path / "plan.json", "--json").json()
    assert json.loads((tmp_path / "plan.json").read_text()) == shown["plan"]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert shown["plan"]["seed"] == 7
    other = run("plan", dense, "--ratio", 0.2, "--importance", "random", "--set", "prune.seed=8", "--json").json()
    assert other["plan"]["cuts"] != shown["plan"]["cuts"]


def kept(cut) -> list[int]:
    runs = [run.split("-") for run in cut["kept"].split(",")]
    return [unit for run in runs for unit in range(int(run[0]), int(run[-1]) + 1)]


def test_discover_proves_its_groups(run, dense):
    shown = run("discover", dense, "--verify", "--json")
    assert shown.code == 0
    verdicts = {v["kind"]: v["verdict"] for v in shown.json()["verdicts"]}
    assert verdicts == dict.fromkeys(("attention", "mlp", "query", "hidden", "layer", "vocabulary"), "verified")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, shared):
    """A type of model without a plugin."""
    folder = tmp_path_factory.mktemp("qwen")
    config = Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for file in (shared / "dense").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.slow
def test_a_model_without_a_plugin_needs_no_option(run, qwen, tmp_path):
    done = run("prune", qwen, "--ratio", 0.2, "--samples", 2, "--set", "prune.length=16", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.err.count("• structure of this qwen2 model discovered by tracing\n") == 1
    record = json.loads((tmp_path / "out" / "llmpruner.json").read_text())
    assert record["plans"][0]["family"] == "auto"
    assert run("generate", tmp_path / "out", "-p", "The fox", "--max-new-tokens", 2).code == 0
