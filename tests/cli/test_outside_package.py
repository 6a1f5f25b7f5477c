"""Plugins as a user meets them: a package that adds one component of every kind, and others, at the command line."""

import json
from pathlib import Path

import pytest
import torch
import typer
from as_installed import install
from safetensors.torch import load_file
from typer.testing import CliRunner

import llmpruner
from llmpruner import Catalog, hookimpl
from llmpruner.cli.app import build_app
from llmpruner.plugins.installed import KINDS
from llmpruner.plugins.manager import PluginManager
from llmpruner.testing import catalog_with


@pytest.fixture(autouse=True)
def outside(tmp_path_factory, monkeypatch):
    """The package as it is installed: on the path, with its entry point."""
    site = tmp_path_factory.mktemp("site")
    install(site, "llmpruner-outside")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "packages"))
    return site


def test_installed_packages_are_listed_and_may_be_blocked(run, outside, monkeypatch):
    install(outside, "llmpruner-broken")
    done = run("plugins", "--json")
    (broken,) = done.json()["broken"]
    assert broken.startswith("plugin 'broken' (llmpruner-broken) is broken and was skipped: RuntimeError: this plugin")
    assert done.err == f"warning: {broken}\n"
    rows = {row["name"]: row["kind"] for row in done.json()["plugins"] if row["package"] == "llmpruner-outside"}
    assert (rows["unknown"], rows["nothing"]) == ("family", "recovery strategy") and len(rows) == 13
    monkeypatch.setenv("LLMPRUNER_BLOCK", "broken,outside")
    done = run("plugins", "--json")
    assert done.err == "" and done.json()["broken"] == []
    assert run("hello").code == 2


PRUNES = {
    "--set prune.allocation=tapered --set tapered.slope=1 --importance l2 --set prune.layers=all --shape free": {
        "selection": {"allocation": "tapered", "settings": {"slope": 1.0}}
    },
    "--budget matrices --importance l2": {"target": {"budget": "matrices"}},
    "--set prune.compensate=keep-norm --set keep-norm.share=0.5 --importance l2": {
        "compensation": {"name": "keep-norm", "settings": {"share": 0.5}}
    },
    "--calibration counting:100 --set counting.step=3 --samples 4 --set prune.length=8": {
        "estimation": {"calibration": "counting:100"}
    },
    "--importance magnitude --set magnitude.power=3": {
        "estimation": {"criterion": "magnitude", "settings": {"power": 3.0}}
    },
    "--method cautious": {"estimation": {"criterion": "wanda-sp"}, "compensation": {"name": "refit"}},
}
"""Options → some of the plan that they give."""


@pytest.mark.parametrize("options", PRUNES)
def test_a_plan_from_the_command_line(run, dense, options):
    plan = run("plan", dense, "--ratio", "0.2", *options.split(), "--json").json()["plan"]
    for part, values in PRUNES[options].items():
        assert {key: plan[part][key] for key in values} == values
    if "tapered" in options:
        widths = [len(cut.kept) for cut in llmpruner.PruningPlan.model_validate(plan).cuts.values()]
        assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]


def test_a_compensation_changes_the_weights(run, dense, tmp_path, monkeypatch):
    for name, options in {"plain": [], "scaled": ["--set", "prune.compensate=keep-norm"]}.items():
        done = run("prune", dense, "--ratio", "0.2", "--importance", "l2", *options, "-o", tmp_path / name)
        assert done.code == 0, done.err
        # In memory, however little is free: it does not say that it works layer by layer.
        monkeypatch.setattr("llmpruner.pruning.forecast.free_memory", lambda _: 0)
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


def test_a_strategy_trains_by_its_own_loss(run, pruned, shared, tmp_path):
    options = ("--max-steps", 2, "--batch-size", 2, "--learning-rate", 0.01, "-o", tmp_path / "out")
    assert run("recover", pruned, "--data", shared / "data.jsonl", "--strategy", "imitation", *options).code in (0, 3)
    (record,) = json.loads((tmp_path / "out" / "llmpruner.json").read_text())["recovery"]
    assert record["strategy"] == "imitation" and record["losses"][1] != record["losses"][0] > 0


def test_a_pruned_model_names_the_family_that_is_missing(run, refused, dense, tmp_path, monkeypatch):
    prune = ("--ratio", "0.2", "--importance", "l2", "--family", "unknown", "-o", tmp_path / "out")
    assert run("prune", dense, *prune).code == 0
    monkeypatch.setenv("LLMPRUNER_BLOCK", "outside")
    assert "is of family 'unknown', which no plugin here adds; install" in refused("discover", tmp_path / "out")
    assert run("discover", tmp_path / "out", "--family", "auto").code == 0
    assert run("verify", tmp_path / "out").code == 0  # which is no damage


def test_a_command_runs(run, refused):
    result = run("hello", "--name", "llama")
    assert (result.code, result.out) == (0, "hello, llama\n")
    assert "Greet someone" in run("--help").out
    assert refused("hello", "--nam", "x") == "`llmpruner hello` has no option --nam; did you mean --name?"


class Other:
    @hookimpl
    def llmpruner_commands(self, app: typer.Typer) -> None:
        @app.command(name="prune")
        def prune_roses() -> None:
            raise AssertionError

        @app.command()
        def fine() -> None:
            typer.echo("fine")

        group = typer.Typer(name="zoo", help="Has a name of its own.")
        group.command("open")(fine)
        group.command("close")(fine)
        app.add_typer(group)


def test_a_command_whose_name_is_taken_is_left_out():
    app = build_app(catalog_with(Other()).plugins)
    done = CliRunner().invoke(app, ["fine"])
    assert (done.exit_code, done.stdout) == (0, "fine\n")
    assert done.stderr == "warning: a plugin's command 'prune' was skipped: it exists already\n"
    assert "--ratio" in CliRunner().invoke(app, ["prune", "--help"]).stdout
    assert CliRunner().invoke(app, ["zoo", "open"]).stdout == "fine\n"


def test_without_the_built_ins_exactly_they_are_gone(run, monkeypatch):
    rows = run("plugins", "--json").json()["plugins"]
    assert all(row["package"] and row["summary"] for row in rows)
    everything = {(row["kind"], row["name"]) for row in rows}
    built_in = Catalog(PluginManager(entry_points=False))
    theirs = {(kind, name) for kind, base in KINDS.items() for name in built_in[base]}
    assert theirs and ("criterion", "taylor") in theirs
    monkeypatch.setenv("LLMPRUNER_BLOCK", "builtin")
    left = {(row["kind"], row["name"]) for row in run("plugins", "--json").json()["plugins"]}
    assert left == everything - theirs and ("criterion", "magnitude") in left
