"""Finding plugins, calling their hooks, checking what they return, and choosing among families."""

import json
import sys
from typing import Literal

import as_installed
import pytest
from pydantic import Field
from transformers import LlamaConfig
from typer.testing import CliRunner

from llmpruner import CheckpointReader, ImportanceCriterion, ModelError, ModelFamily, hookimpl, load_catalog
from llmpruner.cli.app import build_app
from llmpruner.component import ComponentSettings
from llmpruner.discovery.opening import family_for, register_models
from llmpruner.errors import PluginError, SettingsError, UnknownNameError, UnsupportedModelError
from llmpruner.evaluation.evaluate import Metric
from llmpruner.models.reference import resolve
from llmpruner.plugins import hookspecs
from llmpruner.plugins.installed import KINDS
from llmpruner.testing import catalog_with


def component(base: type, name: str = "zoo", **members) -> type:
    return type(name.title(), (base,), {"name": name, **members})


READER = component(CheckpointReader, recognises=lambda self, path: path.suffix == ".zoo")


def plugin(function, hook: str = "llmpruner_metrics"):
    """A plugin with one hook, whose body is ``function`` (without self)."""
    return type("Plugin", (), {hook: staticmethod(hookimpl(specname=hook)(function))})()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package with one entry point on the path, as an installer would."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules: list[str] = []

    def install(package: str, code: str, *, entry: str | None = None) -> None:
        modules.append(as_installed.install(tmp_path, package, entry=entry))
        (tmp_path / f"{modules[-1]}.py").write_text(f"from llmpruner import *\n{code}\n", encoding="utf-8")

    yield install
    for module in modules:
        sys.modules.pop(module, None)


CRITERION = """
class Mine(ImportanceCriterion):
    name = "{name}"
@hookimpl
def llmpruner_importance_criteria():
    return [Mine]
"""

# Every hook


def test_every_hook_is_that_of_one_kind_or_adds_commands():
    hooks = [name for name in vars(hookspecs) if name.startswith("llmpruner_")]
    assert sorted(hooks) == sorted(["llmpruner_commands", *(kind.hook for kind in KINDS.values())])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_plugin_adds_a_component_of_each_kind_and_is_called_once_when_the_kind_is_asked_for(kind):
    calls, added = [], READER if kind is CheckpointReader else component(kind)
    catalog = catalog_with(plugin(lambda: calls.append(1) or [added], kind.hook))
    for other in KINDS.values():
        if other is not kind:
            list(catalog[other])
    assert calls == []
    registry = catalog[kind]
    assert registry["zoo"] is added and type(registry.create("zoo")) is added
    assert registry.package_of("zoo") == __name__ and list(registry) == list(catalog[kind])
    assert calls == [1] and catalog.plugins.broken == []


# Plugins that are installed


BROKEN = {
    "an exception": ("raise RuntimeError('no such luck')", "RuntimeError: no such luck"),
    "an exit": ("raise SystemExit('bye')", "SystemExit: bye"),
    "bad syntax": ("def (:", "SyntaxError: "),
    "no hook": (
        "del llmpruner_importance_criteria",
        "it has no hook; a function is one if it is marked with @llmpruner.hookimpl",
    ),
    "a hook that does not exist": ("@hookimpl\ndef llmpruner_metric(): return []", "unknown hook 'llmpruner_metric'"),
    "an argument that the hook lacks": (
        "@hookimpl\ndef llmpruner_metrics(door): return []",
        "PluginValidationError: Argument(s) {'door'} are declared in the hookimpl",
    ),
}


def test_a_broken_plugin_is_named_where_its_command_is_missing(install):
    install("a-bad-plugin", "raise RuntimeError('no such luck')")
    done = CliRunner().invoke(build_app(), ["greet"])
    assert "RuntimeError: no such luck" in done.stderr and "no command 'greet'" in str(done.exception)


@pytest.mark.parametrize("what", BROKEN)
def test_a_plugin_that_cannot_be_loaded_is_named_and_skipped(install, what):
    code, reason = BROKEN[what]
    install("a-bad-plugin", CRITERION.format(name="half") + code)
    install("good-plugin", CRITERION.format(name="good"))
    catalog = load_catalog()
    (line,) = catalog.plugins.broken
    assert reason in line and "\n" not in line
    assert line.startswith("plugin 'a-bad-plugin' (a-bad-plugin) is broken and was skipped: ")
    assert "half" not in catalog[ImportanceCriterion] and {"good", "taylor"} <= {*catalog[ImportanceCriterion]}
    assert catalog[ImportanceCriterion].package_of("good") == "good-plugin"


def test_a_hook_that_fails_is_an_error_that_names_its_module(install):
    install("a-bad-plugin", "@hookimpl\ndef llmpruner_metrics(): raise ValueError('not today')")
    message = "^llmpruner_metrics of plugin 'a-bad-plugin' failed: ValueError: not today; LLMPRUNER_BLOCK=a-bad"
    with pytest.raises(PluginError, match=message):
        list(load_catalog()[Metric])
    assert "taylor" in load_catalog()[ImportanceCriterion]


def test_a_hook_may_be_wrapped(install):
    """As pluggy has it: a wrapper sees the results of all plugins, and may replace them."""
    code = "@hookimpl(wrapper=True)\ndef llmpruner_metrics():\n    results = yield\n    return results[:0]"
    install("a-wrapper", code)
    assert not load_catalog()[Metric]


def test_two_plugins_of_one_name(install):
    install("a-plugin", CRITERION.format(name="first"), entry="zoo")
    install("b-plugin", CRITERION.format(name="second"), entry="zoo")
    catalog = load_catalog()
    (line,) = catalog.plugins.broken
    assert (
        "'zoo' (b-plugin)" in line
        and "first" in catalog[ImportanceCriterion]
        and "second" not in catalog[ImportanceCriterion]
    )


# What hooks return


@pytest.mark.parametrize(("returned", "problem"), [
    (3, "it is no subclass of Metric"),
    (component(Metric, ""), "its name is ''; expected lower case"),
    (component(Metric, "Loud"), "its name is 'Loud'"),
])  # fmt: skip
def test_a_class_that_cannot_be_used_is_left_out(returned, problem):
    catalog = catalog_with(plugin(lambda: [returned, component(Metric)]))
    assert "zoo" in catalog[Metric]
    (line,) = catalog.plugins.broken
    assert line.startswith("llmpruner_metrics: ") and problem in line


def test_of_two_classes_of_one_name_the_second_is_left_out():
    catalog = catalog_with(component(ImportanceCriterion, "taylor"))
    assert catalog[ImportanceCriterion].package_of("taylor") == "llmpruner"
    assert catalog.plugins.broken[0].endswith("was skipped: Taylor of llmpruner has the name 'taylor' already")
    shared = component(Metric)
    catalog = catalog_with(shared, shared)
    assert catalog[Metric]["zoo"] is shared and catalog.plugins.broken == []


class Power(Metric):
    """Its summary, whose brackets are no markup, is shown instead of this."""

    name = "power"
    summary = "a metric with [settings]"

    class Settings(ComponentSettings):
        power: float = Field(1.0, gt=0, le=4, description="The power.")
        limit: int | None = Field(None, ge=1, description="Rows.")
        norm: Literal["mean", "max"] = Field("mean", description="How rows are joined.")
        layers: tuple[int, ...] = ()


def test_a_component_is_created_by_name_with_settings():
    catalog = catalog_with(Power)
    power = catalog[Metric].create("power", {"power": "2"})
    assert power.record() == {"power": 2.0, "limit": None, "norm": "mean", "layers": []}
    with pytest.raises(SettingsError, match=r"metric power: power 9: input should be less"):
        catalog[Metric].create("power", {"power": 9})
    with pytest.raises(SettingsError, match=r"unknown setting 'colour'\. Known: power, limit, norm, layers"):
        catalog[Metric].create("power", {"colour": "red"})
    with pytest.raises(UnknownNameError, match="unknown metric 'powr'; did you mean power"):
        catalog[Metric].create("powr")


def test_the_command_shows_every_setting():
    app = build_app(catalog_with(Power).plugins)
    (shown,) = json.loads(CliRunner().invoke(app, ["plugins", "power", "--json"]).stdout)
    assert (shown["kind"], shown["package"], shown["summary"]) == ("metric", __name__, Power.summary)
    assert [tuple(setting.values()) for setting in shown["settings"]] == [
        ("power", "float", 1.0, "above 0, at most 4", "The power."),
        ("limit", "int | none", None, "at least 1", "Rows."),
        ("norm", "mean | max", "mean", "", "How rows are joined."),
        ("layers", "list of int", [], "", ""),
    ]
    assert Power.summary in " ".join(CliRunner().invoke(app, ["plugins", "power"]).stdout.split())
    result = CliRunner().invoke(app, ["plugins", "powr"])
    assert isinstance(result.exception, UnknownNameError)


# Families


class Giraffe(ModelFamily):
    name = "giraffe"
    model_types = ("llama",)


def test_the_users_choice_wins(catalog):
    assert family_for(catalog, LlamaConfig(name_or_path="vicuna-7b"), "llama").name == "llama"
    assert family_for(catalog, LlamaConfig(), "auto").name == "auto"
    with pytest.raises(UnknownNameError, match="unknown family 'vicunia'; did you mean vicuna"):
        family_for(catalog, LlamaConfig(), "vicunia")


def test_two_families_of_one_rank_are_both_named():
    catalog = catalog_with(Giraffe, entry_points=True)
    message = r"several families match model type 'llama': giraffe \(test_plugins\), llama \(llmpruner\); .*--family"
    with pytest.raises(UnsupportedModelError, match=message):
        family_for(catalog, LlamaConfig())
    assert family_for(catalog, LlamaConfig(), "giraffe").name == "giraffe"


def test_of_two_families_the_one_that_extends_the_other_matches():
    tall = component(Giraffe, "tall-giraffe", extends="giraffe")
    for order in ((Giraffe, tall), (tall, Giraffe)):
        assert family_for(catalog_with(*order), LlamaConfig()).name == "tall-giraffe"


def test_a_family_that_cannot_register_its_models_is_named_and_stops_nothing():
    def fails(self):
        raise ModuleNotFoundError("No module named 'zebra'")

    catalog = catalog_with(component(ModelFamily, register_models=fails))
    for _ in range(2):
        register_models(catalog)
    (line,) = catalog.plugins.broken
    assert line == f"family 'zoo' ({__name__}) cannot register its models: ModuleNotFoundError: No module named 'zebra'"


def test_one_reader_may_recognise_a_path(tmp_path):
    for name in ("a.zoo", "a.wood"):
        (tmp_path / name).touch()
    assert resolve(tmp_path / "a.zoo", catalog_with(READER)).reader.name == "zoo"
    with pytest.raises(ModelError, match="is a file, not a model directory"):
        resolve(tmp_path / "a.wood", catalog_with(READER))
