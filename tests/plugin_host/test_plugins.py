"""Finding plugins, calling their hooks, checking what they return, and choosing among families."""

import json
import sys
from pathlib import Path
from typing import Literal

import as_installed
import pytest
from pydantic import Field
from transformers import BertConfig, LlamaConfig
from typer.testing import CliRunner

from llmpruner import Catalog, CheckpointReader, ImportanceCriterion, ModelFamily, UnsupportedModelError, hookimpl
from llmpruner.cli.app import build_app
from llmpruner.component import ComponentSettings
from llmpruner.errors import PluginError, SettingsError, UnknownNameError
from llmpruner.evaluation.evaluate import Metric
from llmpruner.plugins import hookspecs
from llmpruner.plugins.catalog import KINDS
from llmpruner.testing import catalog_with


def component(base: type, name: str = "zoo", **members) -> type:
    return type(name.title(), (base,), {"name": name, **members})


def zoo() -> Catalog:
    reader = {"recognises": lambda self, path: path.suffix == ".zoo"}
    kinds = KINDS.values()
    return catalog_with(*(component(k.base, **(reader if k.base is CheckpointReader else {})) for k in kinds))


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
def test_a_plugin_adds_a_component_of_each_kind(kind):
    catalog = zoo()
    registry = catalog.registries[kind.name]
    assert registry is getattr(catalog, kind.attrname) and issubclass(registry["zoo"], kind.base)
    assert registry.package_of("zoo") == __name__ and type(registry.create("zoo")) is registry["zoo"]
    assert catalog.manager.broken == []


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_hook_is_called_once_and_only_when_its_kind_is_asked_for(kind):
    calls = []
    catalog = catalog_with(plugin(lambda: calls.append(1) or [], kind.hook))
    for other in KINDS.values():
        if other is not kind:
            list(getattr(catalog, other.attrname))
    assert calls == []
    assert len(catalog.registries) == len(KINDS) == len(catalog.registries)
    assert calls == [1]


# Plugins that are installed


BROKEN = {
    "an exception": ("raise RuntimeError('no such luck')", "RuntimeError: no such luck"),
    "an exit": ("raise SystemExit('bye')", "SystemExit: bye"),
    "bad syntax": ("def (:", "SyntaxError: "),
    "a hook that does not exist": ("@hookimpl\ndef llmpruner_metric(): return []", "unknown hook 'llmpruner_metric'"),
    "an argument that the hook lacks": (
        "@hookimpl\ndef llmpruner_metrics(door): return []",
        "PluginValidationError: Argument(s) {'door'} are declared in the hookimpl",
    ),
}


def test_a_plugin_without_a_marked_function_is_named(install):
    install("a-bad-plugin", CRITERION.format(name="half").replace("@hookimpl", ""))
    (line,) = Catalog().manager.broken
    assert line.endswith("it has no hook; a function is one if it is marked with @llmpruner.hookimpl")


def test_a_broken_plugin_is_named_where_its_command_is_missing(install):
    install("a-bad-plugin", "raise RuntimeError('no such luck')")
    done = CliRunner().invoke(build_app(), ["greet"])
    assert done.exit_code == 2 and "RuntimeError: no such luck" in done.stderr and "'greet'" in done.stderr


@pytest.mark.parametrize("what", BROKEN)
def test_a_plugin_that_cannot_be_loaded_is_named_and_skipped(install, what):
    code, reason = BROKEN[what]
    install("a-bad-plugin", CRITERION.format(name="half") + code)
    install("good-plugin", CRITERION.format(name="good"))
    catalog = Catalog()
    (line,) = catalog.manager.broken
    assert reason in line and "\n" not in line
    assert line.startswith("plugin 'a-bad-plugin' (a-bad-plugin) is broken and was skipped: ")
    assert "half" not in catalog.criteria and {"good", "taylor"} <= {*catalog.criteria}
    assert catalog.criteria.package_of("good") == "good-plugin"


@pytest.mark.parametrize(("body", "reason"), [
    ("raise ValueError('not today')", "ValueError: not today"),
    ("return ImportanceCriterion", "TypeError: 'type' object is not iterable"),
])  # fmt: skip
def test_a_hook_that_fails_is_an_error_that_names_its_module(install, body, reason):
    install("a-bad-plugin", f"@hookimpl\ndef llmpruner_metrics(): {body}")
    message = f"^llmpruner_metrics of plugin 'a-bad-plugin' failed: {reason}; LLMPRUNER_BLOCK=a-bad"
    with pytest.raises(PluginError, match=message):
        list(Catalog().metrics)
    assert "taylor" in Catalog().criteria


def test_two_plugins_of_one_name(install):
    install("a-plugin", CRITERION.format(name="first"), entry="zoo")
    install("b-plugin", CRITERION.format(name="second"), entry="zoo")
    catalog = Catalog()
    (line,) = catalog.manager.broken
    assert "'zoo' (b-plugin)" in line and "first" in catalog.criteria and "second" not in catalog.criteria


# What hooks return


@pytest.mark.parametrize(("returned", "problem"), [
    (3, "it is no subclass of Metric"),
    (component(Metric, ""), "its name is ''; expected lower case"),
    (component(Metric, "Loud"), "its name is 'Loud'"),
])  # fmt: skip
def test_a_class_that_cannot_be_used_is_left_out(returned, problem):
    catalog = catalog_with(plugin(lambda: [returned, component(Metric)]))
    assert "zoo" in catalog.metrics
    (line,) = catalog.manager.broken
    assert line.startswith("llmpruner_metrics: ") and problem in line


def test_of_two_classes_of_one_name_the_second_is_left_out():
    catalog = catalog_with(component(ImportanceCriterion, "taylor"))
    assert catalog.criteria.package_of("taylor") == "llmpruner"
    assert catalog.manager.broken[0].endswith("was skipped: Taylor of llmpruner has the name 'taylor' already")
    shared = component(Metric)
    catalog = catalog_with(shared, shared)
    assert catalog.metrics["zoo"] is shared and catalog.manager.broken == []


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
    power = catalog.metrics.create("power", {"power": "2"})
    assert power.record() == {"power": 2.0, "limit": None, "norm": "mean", "layers": []}
    with pytest.raises(SettingsError, match=r"metric power: power 9: input should be less"):
        catalog.metrics.create("power", {"power": 9})
    with pytest.raises(SettingsError, match=r"unknown setting 'colour'\. Known: power, limit, norm, layers"):
        catalog.metrics.create("power", {"colour": "red"})
    with pytest.raises(UnknownNameError, match="unknown metric 'powr'; did you mean power"):
        catalog.metrics.create("powr")


def test_the_command_shows_every_setting():
    app = build_app(catalog_with(Power).manager)
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
    assert catalog.family_for(LlamaConfig(name_or_path="vicuna-7b"), "llama").name == "llama"
    assert catalog.family_for(LlamaConfig(), "auto").name == "auto"
    with pytest.raises(UnknownNameError, match="unknown family 'vicunia'; did you mean vicuna"):
        catalog.family_for(LlamaConfig(), "vicunia")


def test_two_families_of_one_rank_are_both_named():
    catalog = catalog_with(Giraffe, entry_points=True)
    message = r"several families match model type 'llama': giraffe \(test_plugins\), llama \(llmpruner\); .*--family"
    with pytest.raises(UnsupportedModelError, match=message):
        catalog.family_for(LlamaConfig())
    assert catalog.family_for(LlamaConfig(), "giraffe").name == "giraffe"


def test_of_two_families_the_one_that_extends_the_other_matches():
    tall = component(Giraffe, "tall-giraffe", extends="giraffe")
    for order in ((Giraffe, tall), (tall, Giraffe)):
        assert catalog_with(*order).family_for(LlamaConfig()).name == "tall-giraffe"


def test_what_no_family_matches_is_discovered(catalog):
    assert catalog.family_for(BertConfig()).name == "auto"


def test_a_family_that_cannot_register_its_models_is_named_and_stops_nothing():
    def register_models(self):
        raise ModuleNotFoundError("No module named 'zebra'")

    catalog = catalog_with(component(ModelFamily, register_models=register_models))
    for _ in range(2):
        catalog.register_models()
    (line,) = catalog.manager.broken
    assert line == f"family 'zoo' ({__name__}) cannot register its models: ModuleNotFoundError: No module named 'zebra'"


def test_one_reader_may_recognise_a_path():
    catalog = zoo()
    assert catalog.reader_for(Path("a.zoo")).name == "zoo"
    assert catalog.reader_for(Path("a.wood")) is None
