"""A package that adds one component of every kind, used from the command line and from Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from as_installed import install
from safetensors.torch import load_file

import llmpruner
from llmpruner import Catalog
from llmpruner.plugins.manager import plugin_manager

PACKAGES = Path(__file__).parents[1] / "packages"


@pytest.fixture(autouse=True)
def outside(tmp_path_factory, monkeypatch):
    """The package as it is installed: on the path, with its entry point."""
    site = tmp_path_factory.mktemp("site")
    install(site, "llmpruner-outside")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.syspath_prepend(str(PACKAGES))


PRUNES = {
    "allocation": [
        *("--set", "prune.allocation=tapered", "--set", "tapered.slope=1", "--importance", "l2"),
        *("--set", "prune.layers=all", "--shape", "free"),
    ],
    "budget": ["--budget", "matrices", "--importance", "l2"],
    "compensation": ["--set", "prune.compensate=keep-norm", "--set", "keep-norm.share=0.5", "--importance", "l2"],
    "source": [
        *("--calibration", "counting:100", "--set", "counting.step=3"),
        *("--samples", "4", "--set", "prune.length=8"),
    ],
    "criterion": ["--importance", "magnitude", "--set", "magnitude.power=3"],
    "method": ["--method", "cautious"],
}


@pytest.mark.parametrize("kind", PRUNES)
def test_a_plan_from_the_command_line(run, dense, kind):
    plan = run("plan", dense, "--ratio", "0.2", *PRUNES[kind], "--json").json()["plan"]
    if kind == "allocation":
        assert plan["selection"]["allocation"] == "tapered" and plan["selection"]["settings"] == {"slope": 1.0}
        kept = {cut["layer"]: llmpruner.PruningPlan.model_validate(plan).kept for cut in plan["cuts"].values()}
        widths = [len(kept[layer][f"layers.{layer}.mlp"]) for layer in sorted(kept)]
        assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]
    elif kind == "budget":
        assert plan["target"]["budget"] == "matrices"
    elif kind == "compensation":
        assert plan["compensation"]["name"] == "keep-norm" and plan["compensation"]["settings"] == {"share": 0.5}
    elif kind == "source":
        assert plan["estimation"]["calibration"] == "counting:100"
    elif kind == "criterion":
        assert plan["estimation"]["criterion"] == "magnitude" and plan["estimation"]["settings"] == {"power": 3.0}
    else:
        assert plan["estimation"]["criterion"] == "wanda-sp" and plan["compensation"]["name"] == "refit"


def test_a_compensation_changes_the_weights(run, dense, tmp_path):
    for name, options in {"plain": [], "scaled": ["--set", "prune.compensate=keep-norm"]}.items():
        done = run("prune", dense, "--ratio", "0.2", "--importance", "l2", *options, "-o", tmp_path / name)
        assert done.code == 0, done.err
    name = "model.layers.1.mlp.down_proj.weight"
    before = load_file(dense / "model.safetensors")[name]
    plain, scaled = (load_file(tmp_path / n / "model.safetensors")[name] for n in ("plain", "scaled"))
    assert torch.allclose(scaled.norm(), before.norm(), rtol=1e-4) and plain.norm() < before.norm()


def test_a_runtime_from_the_command_line(run, dense, tmp_path):
    options = ("--batch", 1, "--prompt", 8, "--new", 2, "--rounds", 1, "--json", tmp_path / "b.json")
    assert run("bench", dense, dense, "--runtime", "slow", *options).code == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["runtime"] == "slow" and len(found["cases"][0]["models"]) == 2


def test_a_metric_an_exporter_and_a_section_from_the_command_line(run, dense, tmp_path):
    text = ("--metrics", "vocabulary", "--set", "vocabulary.text=####")
    done = run("evaluate", dense, *text, "--json", tmp_path / "e.json")
    assert done.code == 0 and "vocabulary tokens" in done.out
    assert 0 < json.loads((tmp_path / "e.json").read_text())[0]["vocabulary"]["tokens"] < 5
    done = run("export", dense, "--to", "weights", "--set", "weights.file=all.pt", "-o", tmp_path / "x")
    assert done.code == 0 and done.out.endswith("torch.load reads it\n"), done.err
    assert torch.load(tmp_path / "x" / "all.pt")["lm_head.weight"].dtype is torch.float32
    assert run("prune", dense, "--ratio", "0.2", "--importance", "l2", "-o", tmp_path / "pruned").code == 0
    assert "<h2>Widths</h2>" in (tmp_path / "pruned" / "report.html").read_text(encoding="utf-8")


def test_a_wrong_setting_is_one_line(run, dense):
    done = run("plan", dense, "--ratio", "0.2", "--importance", "magnitude", "--set", "magnitude.power=-1")
    assert done.code == 2 and "criterion magnitude: power" in done.err and done.err.count("\n") == 1
    done = run("plan", dense, "--ratio", "0.2", "--importance", "magnitude", "--set", "magnitude.pover=1")
    assert done.code == 2 and "unknown setting 'pover'; did you mean power" in done.err
    done = run("plan", dense, "--ratio", "0.2", "--set", "magnitude.power=1")
    assert done.code == 2 and "'magnitude' is not chosen" in done.err


def test_without_the_built_ins_exactly_they_are_gone(run, monkeypatch):
    rows = run("plugins", "--json").json()["plugins"]
    assert all(row["package"] and row["summary"] for row in rows)
    everything = {(row["kind"], row["name"]) for row in rows}
    built_in = Catalog(plugin_manager(entry_points=False))
    theirs = {(registry.kind, name) for registry in built_in.registries.values() for name in registry}
    assert theirs and ("criterion", "taylor") in theirs
    monkeypatch.setenv("LLMPRUNER_BLOCK", "builtin")
    left = {(row["kind"], row["name"]) for row in run("plugins", "--json").json()["plugins"]}
    assert left == everything - theirs and ("criterion", "magnitude") in left
