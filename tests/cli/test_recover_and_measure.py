"""``recover``, ``evaluate`` and ``generate``, one after the other."""

import json
import math
import shutil

import pytest

import llmpruner
from llmpruner.cli import console

TRAIN = ("--max-steps", 2, "--batch-size", 2, "--set", "recover.micro_batch_size=1", "--learning-rate", 0.01)


def test_a_training_that_helps_nothing_has_its_own_exit_code(run, pruned, shared, tmp_path):
    options = ("--strategy", "full", "--data", shared / "data.jsonl", "--max-steps", 3, "--learning-rate", 5)
    result = run("recover", pruned, *options, "-o", tmp_path / "out")
    assert result.code == 3 and "no better than before" in result.err and "✓" not in result.out + result.err


def test_a_recovered_model_is_recorded_and_used_as_any_other(run, pruned, shared, tmp_path):
    source = shared / "data.jsonl"
    options = (pruned, "--strategy", "lora", "--data", source, "--limit", 3, "--seed", 5, *TRAIN, "--json")
    said = run("recover", *options, "-o", tmp_path / "out").json()
    seconds = said.pop("seconds")
    kept = json.loads((tmp_path / "out" / "llmpruner.json").read_text())["recovery"]
    about = {"model": str(pruned), "output": str(tmp_path / "out"), "checkpoint": "shim"}
    assert said == {**about, **kept[0]} and len(kept) == 1
    assert seconds > 0 and len(said["losses"]) == 2 and all(map(math.isfinite, said["losses"]))
    assert (said["strategy"], said["data"], said["examples"]) == ("lora", str(source), 3)
    assert (said["settings"]["learning_rate"], said["settings"]["seed"]) == (0.01, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    measure = run("evaluate", tmp_path / "out", "--perplexity", shared / "text.txt", "--window", 64)
    assert measure.code == 0 and "perplexity" in measure.out
    assert run("generate", tmp_path / "out", "-p", "The fox", "--max-new-tokens", 3).code == 0


def test_perplexity_side_by_side(run, dense, pruned, shared, tmp_path):
    result = run(
        "evaluate", dense, pruned, "--perplexity", shared / "text.txt", "--window", 32,
        "--set", "perplexity.tokens=128", "--kl", "--json", tmp_path / "report.json",
    )  # fmt: skip
    assert result.code == 0
    rows = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in rows] == [str(dense), str(pruned)]
    assert [row["size"]["decoder_parameters"] for row in rows] == [30_976, 30_976 - 2 * 12 * 96]
    assert "50,208" in next(line for line in result.out.splitlines() if " parameters" in line)
    header = next(line for line in result.out.splitlines() if "dense" in line)
    assert header.index(f" {dense.name} ") < header.index(f" {pruned.name} ")
    for row in rows:
        assert f"{row['perplexity']['perplexity']:.2f}" in result.out
    assert "KL to the first" in result.out
    divergence = [row["perplexity"]["kl_per_token"] for row in rows]
    assert divergence[0] == pytest.approx(0.0, abs=1e-9) and divergence[1] > 1e-6


def test_an_answer_is_printed_as_it_is(run, dense, monkeypatch):
    monkeypatch.setattr(console.out, "width", 20)
    answer = llmpruner.generate(dense, "The fox", max_new_tokens=20)
    assert len(answer) > 20 and answer in run("generate", dense, "-p", "The fox", "--max-new-tokens", 20).out


def test_results_before_a_model_that_fails_are_kept(run, shared, tmp_path):
    dense, file, asked = shared / "dense", tmp_path / "results.json", ("-p", "The fox", "--max-new-tokens", 2)
    result = run("evaluate", dense, shared / "nan", "--metrics", "size", "--json", file)
    assert result.code == 2 and "holds NaN" in result.err
    assert [row["name"] for row in json.loads(file.read_text())] == [str(dense)]
    damaged = shutil.copytree(dense, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"noise")
    result = run("generate", dense, damaged, *asked)
    assert result.code == 2 and "damaged" in result.err and str(dense) in result.out
    result = run("generate", dense, shared / "bare", *asked)
    assert result.code == 2 and "brings no tokenizer" in result.err and result.out == ""
