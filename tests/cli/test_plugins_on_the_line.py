"""Plugins as a user meets them: installed as packages, or registered in-process, and seen through commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from as_installed import install
from typer.testing import CliRunner

from llmpruner import ImportanceCriterion, LlmprunerError, hookimpl
from llmpruner.cli.app import build_app
from llmpruner.plugins.manager import plugin_manager

PACKAGES = Path(__file__).parents[1] / "packages"
WARNING = "plugin 'broken' (llmpruner-broken) is broken and was skipped: RuntimeError: this plugin is broken on purpose"


@pytest.fixture(autouse=True)
def packages(tmp_path, monkeypatch):
    """Two packages, one that works and one that breaks."""
    site = tmp_path / "site"
    site.mkdir()
    for name in ("llmpruner-outside", "llmpruner-broken"):
        install(site, name)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.syspath_prepend(str(PACKAGES))


def test_installed_packages_are_listed(run):
    done = run("plugins", "--json")
    assert done.err.splitlines() == [f"warning: {WARNING}"]
    shown = done.json()
    outside = {row["name"]: row["kind"] for row in shown["plugins"] if row["package"] == "llmpruner-outside"}
    assert (outside["unknown"], outside["nothing"]) == ("family", "recovery strategy") and len(outside) == 14
    assert shown["broken"] == [WARNING]


def test_an_installed_strategy_recovers(run, pruned, shared, tmp_path):
    options = ("--data", shared / "data.jsonl", "--strategy", "nothing", "-o", tmp_path / "out")
    result = run("recover", pruned, *options)
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()


def test_an_installed_strategy_trains_by_its_own_loss(run, pruned, shared, tmp_path):
    options = ("--max-steps", 2, "--batch-size", 2, "--learning-rate", 0.01, "-o", tmp_path / "out")
    assert run("recover", pruned, "--data", shared / "data.jsonl", "--strategy", "imitation", *options).code in (0, 3)
    (record,) = json.loads((tmp_path / "out" / "llmpruner.json").read_text())["recovery"]
    assert record["strategy"] == "imitation" and record["losses"][1] != record["losses"][0] > 0


def test_an_installed_reader_reads(run, dense, tmp_path):
    (tmp_path / "pointer").mkdir()
    (tmp_path / "pointer" / "pointer.txt").write_text(str(dense))
    answers = run("generate", tmp_path / "pointer", dense, "-p", "The", "--max-new-tokens", 4, "--json").json()
    first, second = answers["answers"].values()
    assert first == second


def test_an_installed_command_runs(run):
    result = run("hello", "--name", "llama")
    assert (result.code, result.out) == (0, "hello, llama\n")
    assert "Greet someone" in run("--help").out


def test_a_blocked_plugin_prints_nothing(run, monkeypatch):
    monkeypatch.setenv("LLMPRUNER_BLOCK", "broken,outside")
    result = run("plugins", "--json")
    assert result.err == ""
    assert result.json()["broken"] == []
    assert run("hello").code == 2


class Greeter:
    """A plugin registered by a test."""

    @hookimpl
    def llmpruner_commands(self, app: typer.Typer) -> None:
        @app.command()
        def greet(who: str = "you") -> None:
            if who == "nobody":
                raise LlmprunerError("nobody cannot be greeted")
            typer.echo(f"hello, {who}")


def app_with(**plugins) -> typer.Typer:
    manager = plugin_manager(entry_points=False)
    for name, plugin in plugins.items():
        manager.register(plugin, name)
    return build_app(manager)


def test_a_command_registered_in_process():
    app = app_with(greeter=Greeter())
    assert CliRunner().invoke(app, ["greet", "--who", "me"]).output == "hello, me\n"
    mistake = CliRunner().invoke(app, ["greet", "--who", "nobody"])
    assert isinstance(mistake.exception, LlmprunerError)
    mistake = CliRunner().invoke(app, ["greet", "--whom", "me"])
    assert str(mistake.exception) == "`llmpruner greet` has no option --whom; did you mean --who?"


class Other:
    """A command whose name is taken, and a command."""

    @hookimpl
    def llmpruner_commands(self, app: typer.Typer) -> None:
        @app.command(name="prune")
        def prune_roses() -> None:
            raise AssertionError

        @app.command()
        def fine() -> None:
            typer.echo("fine")


def test_a_command_whose_name_is_taken_is_left_out():
    app = app_with(other=Other())
    done = CliRunner().invoke(app, ["fine"])
    assert (done.exit_code, done.stdout) == (0, "fine\n")
    assert done.stderr == "warning: a plugin's command 'prune' was skipped: it exists already\n"
    assert "--ratio" in CliRunner().invoke(app, ["prune", "--help"]).stdout


class Mixed:
    """A plugin of which one criterion can be used, and one cannot."""

    @hookimpl
    def llmpruner_importance_criteria(self):
        class Nameless(ImportanceCriterion):
            """Has no name."""

        class Useful(ImportanceCriterion):
            name = "useful"
            summary = "the mean of squares, with E[g²] and all"

        return [Nameless, Useful]


def test_plugins_lists_what_was_left_out():
    done = CliRunner().invoke(app_with(mixed=Mixed()), ["plugins", "--json"])
    shown = json.loads(done.stdout)
    (useful,) = (row for row in shown["plugins"] if row["name"] == "useful")
    assert useful == {
        "kind": "criterion",
        "name": "useful",
        "package": "test_plugins_on_the_line",
        "summary": "the mean of squares, with E[g²] and all",
    }
    (line,) = shown["broken"]
    assert "Nameless" in line and done.stderr == f"warning: {line}\n"


def test_brackets_of_a_summary_are_shown():
    shown = CliRunner().invoke(app_with(mixed=Mixed()), ["plugins", "useful"]).stdout
    assert shown.startswith("useful, criterion of test_plugins_on_the_line (") and "with E[g²] and all" in " ".join(
        shown.split()
    )
