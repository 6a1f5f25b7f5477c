"""Finding plugins, calling their hooks, checking what they give, and choosing among families."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Literal

import pytest
import typer
from pydantic import Field
from transformers import BertConfig, LlamaConfig
from typer.testing import CliRunner

from llmpruner import (
    Catalog,
    CheckpointReader,
    DuplicateNameError,
    ImportanceCriterion,
    ModelFamily,
    PluginError,
    RecoveryStrategy,
    UnknownNameError,
    UnsupportedModelError,
    hookimpl,
    plugin_manager,
)
from llmpruner.calibration.source import CalibrationSource
from llmpruner.cli.app import build_app
from llmpruner.component import ComponentSettings
from llmpruner.discovery.graph import build_graph
from llmpruner.discovery.verify import verify
from llmpruner.errors import SettingsError
from llmpruner.evaluation.base import Metric
from llmpruner.evaluation.runtime import Runtime
from llmpruner.exporters.base import Exporter
from llmpruner.plugins.catalog import KINDS
from llmpruner.plugins.describe import SettingFacts, describe, summary_of
from llmpruner.plugins.host import BrokenPlugin
from llmpruner.plugins.manager import HOOKS
from llmpruner.pruning.allocation.base import Allocation
from llmpruner.pruning.budgets.base import Budget
from llmpruner.pruning.compensation.base import Compensation
from llmpruner.pruning.methods.base import Method
from llmpruner.pruning.methods.recipe import NamedRecipe
from llmpruner.report.base import ReportSection

COMMANDS = "llmpruner_commands"
METRICS = "llmpruner_metrics"


def component(base: type, name: str = "zoo", **members) -> type:
    return type(name.title(), (base,), {"name": name, **members})


class Zoo:
    """A plugin that uses every hook: a component named zoo of every kind, and a command."""

    @hookimpl
    def llmpruner_model_families(self):
        return [component(ModelFamily, model_types=("llama",))]

    @hookimpl
    def llmpruner_importance_criteria(self):
        return [component(ImportanceCriterion)]

    @hookimpl
    def llmpruner_allocations(self):
        return (component(Allocation),)

    @hookimpl
    def llmpruner_budgets(self):
        return [component(Budget)]

    @hookimpl
    def llmpruner_compensations(self):
        return [component(Compensation)]

    @hookimpl
    def llmpruner_calibration_sources(self):
        return [component(CalibrationSource)]

    @hookimpl
    def llmpruner_recovery_strategies(self):
        return [component(RecoveryStrategy)]

    @hookimpl
    def llmpruner_metrics(self):
        yield component(Metric)

    @hookimpl
    def llmpruner_exporters(self):
        return [component(Exporter)]

    @hookimpl
    def llmpruner_runtimes(self):
        return [component(Runtime)]

    @hookimpl
    def llmpruner_checkpoint_readers(self):
        return [component(CheckpointReader, recognises=lambda self, path: path.suffix == ".zoo")]

    @hookimpl
    def llmpruner_report_sections(self):
        return [component(ReportSection)]

    @hookimpl
    def llmpruner_methods(self):
        return [component(Method)]

    @hookimpl
    def llmpruner_recipes(self):
        return [component(NamedRecipe)]

    @hookimpl
    def llmpruner_commands(self, app):
        app.command("feed")(lambda: None)


def plugin(function, hook: str = METRICS, **options):
    """A plugin with one hook, whose body is ``function`` (without self). ``options``: of `hookimpl`."""
    return type("Plugin", (), {hook: staticmethod(hookimpl(specname=hook, **options)(function))})()


def giving(*classes, hook: str = METRICS):
    return plugin(lambda: list(classes), hook)


def catalog_with(*, entry_points: bool = False, **plugins) -> Catalog:
    host = plugin_manager(entry_points=entry_points)
    for name, one in plugins.items():
        host.manager.register(one, name)
    return Catalog(host)


def names(catalog: Catalog) -> set[tuple[str, str]]:
    return {(registry.kind, name) for registry in catalog.registries for name in registry}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package with one entry point on the path, as an installer would."""
    monkeypatch.syspath_prepend(str(tmp_path))
    installed: list[str] = []

    def install(package: str, code: str, *, entry: str | None = None) -> None:
        module = package.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(f"from llmpruner import *\n{code}\n", encoding="utf-8")
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[llmpruner]\n{entry or package} = {module}\n", encoding="utf-8")
        installed.append(module)

    yield install
    for module in installed:
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
    assert sorted(HOOKS) == sorted([COMMANDS, *(kind.hook for kind in KINDS.values())])
    assert set(HOOKS) <= set(vars(Zoo)), "the plugin of these tests uses every hook"


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_gives_all_results_of_all_plugins(name):
    assert not HOOKS[name].llmpruner_spec["firstresult"] and not HOOKS[name].llmpruner_spec["historic"]
    for part in ("Returns:", "Called:", "Errors:"):
        assert part in (inspect.getdoc(HOOKS[name]) or ""), f"{name} needs a paragraph '{part}'"


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_plugin_gives_a_component_of_each_kind(kind):
    catalog = catalog_with(zoo=Zoo())
    registry = catalog.registry(kind.name)
    assert issubclass(registry["zoo"], kind.base) and registry.package_of("zoo") == "in-process"
    assert registry is getattr(catalog, kind.attrname)
    assert type(catalog.create(kind.name, "zoo")) is registry["zoo"]
    assert catalog.broken == ()
    assert getattr(kind.base, "kind", kind.name) == kind.name


def test_a_plugin_gives_a_command():
    (answer,) = plugin_and_host(Zoo()).call(COMMANDS, lambda: {"app": typer.Typer()}, returns=False)
    assert (answer.plugin, answer.result) == ("one", [])
    assert [command.name for command in answer.arguments["app"].registered_commands] == ["feed"]


def plugin_and_host(one):
    return catalog_with(one=one).host


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_hook_is_called_once_and_only_when_its_kind_is_asked_for(kind):
    calls = []
    catalog = catalog_with(one=plugin(lambda: calls.append(1) or [], kind.hook))
    for other in KINDS.values():
        if other is not kind:
            list(getattr(catalog, other.attrname))
    assert calls == []
    assert len(catalog.registries) == len(KINDS) and len(catalog.registries) == len(KINDS)
    assert calls == [1]


def test_each_host_starts_afresh():
    catalog_with(zoo=Zoo())
    assert list(catalog_with().families) == ["auto"]


def test_fifty_plugins_and_a_broken_one_among_them(install):
    for number in range(50):
        install(f"plugin-{number:02}", CRITERION.format(name=f"mine-{number:02}"))
    install("plugin-broken", "1 / 0")
    catalog = Catalog(plugin_manager())
    mine = [name for name in catalog.criteria if name.startswith("mine-")]
    assert mine == [f"mine-{number:02}" for number in range(50)]
    assert [broken.name for broken in catalog.broken] == ["plugin-broken"]


# Plugins that are installed


def test_installed_plugins_are_found_by_their_entry_points(install):
    install("good-plugin", CRITERION.format(name="good"))
    catalog = Catalog(plugin_manager())
    assert catalog.criteria["good"].__name__ == "Mine"
    assert catalog.criteria.package_of("good") == "good-plugin"
    assert catalog.families.package_of("llama") == "llmpruner"


WHOLE = {
    "an exception": ("raise RuntimeError('no such luck')", "RuntimeError: no such luck"),
    "an exit": ("raise SystemExit('bye')", "SystemExit: bye"),
    "a missing module": ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such"),
    "bad syntax": ("def (:", "SyntaxError: "),
    "a hook that is no function": ("llmpruner_metrics = [1, 2]", "TypeError: llmpruner_metrics is [1, 2]; expected a"),
}


@pytest.mark.parametrize("what", WHOLE)
def test_a_plugin_that_cannot_be_loaded_is_named_and_skipped(install, what):
    code, reason = WHOLE[what]
    install("a-bad-plugin", CRITERION.format(name="half") + code)
    install("good-plugin", CRITERION.format(name="good"))
    catalog = Catalog(plugin_manager())
    (broken,) = catalog.broken
    assert (broken.name, broken.package, broken.hook) == ("a-bad-plugin", "a-bad-plugin", None)
    assert reason in broken.reason and "\n" not in str(broken)
    assert str(broken).startswith("plugin 'a-bad-plugin' (a-bad-plugin) is broken and was skipped: ")
    assert "half" not in catalog.criteria and {"good", "taylor"} <= {*catalog.criteria}


FAMILIES = "@hookimpl\ndef llmpruner_model_families():"
PARTS = {
    "a hook that raises": (f"{FAMILIES} raise ValueError('not today')", "it raised ValueError: not today"),
    "an exit": (f"{FAMILIES} raise SystemExit(3)", "it raised SystemExit: 3"),
    "nothing returned": (f"{FAMILIES} pass", "it returned None; expected a list of classes"),
    "a class": (f"{FAMILIES} return ModelFamily", "ModelFamily'>; expected a list of classes"),
    "a text": (f"{FAMILIES} return 'llama'", "it returned 'llama'; expected a list of classes"),
    "a generator that raises": (f"{FAMILIES}\n    yield ModelFamily\n    1 / 0", "it raised ZeroDivisionError: div"),
    "an argument that the hook lacks": (
        "@hookimpl\ndef llmpruner_model_families(config, *, door): return []",
        "the hook has no argument config or door; it has: none",
    ),
    "no decorator": ("def llmpruner_model_families(): return []", "the function is not marked with @hookimpl"),
    "a wrapper that does not yield": (
        "@hookimpl(wrapper=True)\ndef llmpruner_model_families(): return []",
        "the function is marked as a wrapper and does not yield",
    ),
    "two sorts of wrapper": (
        "@hookimpl(wrapper=True, hookwrapper=True)\ndef llmpruner_model_families(): yield",
        "the function is marked both wrapper and hookwrapper; keep wrapper",
    ),
}


@pytest.mark.parametrize("what", PARTS)
def test_a_hook_that_fails_costs_that_hook_alone(install, what):
    code, reason = PARTS[what]
    install("a-bad-plugin", CRITERION.format(name="rest") + code)
    catalog = Catalog(plugin_manager())
    assert {"rest", "taylor"} <= {*catalog.criteria} and {"auto", "llama"} <= {*catalog.families}
    (broken,) = catalog.broken
    assert (broken.name, broken.package, broken.hook) == ("a-bad-plugin", "a-bad-plugin", "llmpruner_model_families")
    assert str(broken).startswith("plugin 'a-bad-plugin' (a-bad-plugin): llmpruner_model_families was skipped: ")
    assert reason in broken.reason


def test_a_hook_of_another_version_costs_that_hook_alone(install):
    unknown = "@hookimpl({})\ndef llmpruner_{}(): return []\n"
    code = unknown.format("", "metric") + unknown.format("", "zebra") + unknown.format("optionalhook=True", "later")
    install("a-plugin", CRITERION.format(name="rest") + code)
    catalog = Catalog(plugin_manager())
    assert "rest" in catalog.criteria
    first, second = catalog.broken
    assert first.hook == "llmpruner_metric"
    assert first.reason.endswith("(hooks 2) has no such hook; did you mean llmpruner_metrics?")
    assert second.hook == "llmpruner_zebra"


def test_arguments_may_be_left_out_or_have_defaults():
    def add(app, colour="red"):
        app.command("feed")(lambda: None)

    host = catalog_with(fewer=plugin(lambda: None, COMMANDS), more=plugin(add, COMMANDS)).host
    answers = host.call(COMMANDS, lambda: {"app": typer.Typer()}, returns=False)
    assert [len(answer.arguments["app"].registered_commands) for answer in answers] == [0, 1]
    assert host.broken == ()


def test_a_plugin_that_pluggy_cannot_hold_is_skipped_as_a_whole(install):
    code = "class Unhashable:\n    __hash__ = None\n    @hookimpl\n    def llmpruner_metrics(self): return []\n"
    install("a-plugin", code + "import sys; sys.modules[__name__] = Unhashable()")
    catalog = Catalog(plugin_manager())
    assert list(catalog.metrics) == list(catalog_with().metrics)
    (broken,) = catalog.broken
    assert broken.hook is None and broken.reason == "TypeError: unhashable type: 'Unhashable'"


def test_two_packages_with_one_entry_point_name(install):
    install("a-plugin", CRITERION.format(name="one"), entry="zoo")
    install("b-plugin", CRITERION.format(name="two"), entry="zoo")
    catalog = Catalog(plugin_manager())
    assert "one" in catalog.criteria and "two" not in catalog.criteria
    assert catalog.broken == (BrokenPlugin("zoo", "b-plugin", "its name is taken by a plugin of a-plugin"),)


def test_blocking_leaves_a_plugin_out_before_it_is_imported(install, monkeypatch):
    install("good-plugin", "raise RuntimeError('must not be imported')")
    monkeypatch.setenv("LLMPRUNER_BLOCK", "vicuna, good-plugin")
    catalog = Catalog(plugin_manager())
    assert "vicuna" not in catalog.families and "llama" in catalog.families
    assert sorted(catalog.host.blocked) == ["good-plugin", "vicuna"] and catalog.broken == ()


def test_blocking_the_built_ins_leaves_exactly_the_others(monkeypatch):
    every = Catalog(plugin_manager())
    own = {
        (r.kind, name) for r in every.registries for name, c in r.items() if c.__module__.split(".")[0] == "llmpruner"
    }
    assert ("criterion", "taylor") in own and ("family", "llama") not in own
    monkeypatch.setenv("LLMPRUNER_BLOCK", "builtin")
    host = plugin_manager()
    assert names(Catalog(host)) == names(every) - own
    assert host.blocked == ["builtin"] and host.broken == ()
    listed = json.loads(CliRunner().invoke(build_app(host), ["plugins", "--json"]).stdout)["plugins"]
    assert {(row["kind"], row["name"]) for row in listed} == names(every) - own


def test_tracing_prints_each_call_with_its_plugin_and_its_result(monkeypatch, capsys):
    def show():
        return catalog_with(zoo=Zoo(), bad=plugin(lambda: 1 / 0)).metrics

    show()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("LLMPRUNER_TRACE", "1")
    show()
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    start = next(n for n, line in enumerate(lines) if "llmpruner_metrics of zoo" in line)
    assert any("finish llmpruner_metrics --> [<generator" in line for line in lines[start : start + 3])
    assert any("llmpruner_metrics of bad failed: ZeroDivisionError: division by zero" in line for line in lines)


# Wrappers


def without_zoo(results):
    return [[cls for cls in result if cls.name != "zoo"] for result in results]


def new_wrapper():
    return without_zoo((yield))


def old_wrapper():
    outcome = yield
    outcome.force_result(without_zoo(outcome.get_result()))


@pytest.mark.parametrize(
    "wrapper", [plugin(new_wrapper, wrapper=True), plugin(old_wrapper, hookwrapper=True)], ids=["new", "old"]
)
def test_a_wrapper_changes_what_others_give(wrapper):
    catalog = catalog_with(one=giving(component(Metric), component(Metric, "other")), wrapper=wrapper)
    assert "zoo" not in catalog.metrics and "other" in catalog.metrics
    assert catalog.broken == ()


def test_a_wrapper_may_take_everything_out():
    def nothing():
        yield
        return []

    catalog = catalog_with(
        one=giving(component(Metric)), empty=plugin(lambda: None), wrapper=plugin(nothing, wrapper=True)
    )
    assert list(catalog.metrics) == []
    assert [broken.name for broken in catalog.broken] == ["empty"]


def test_a_wrapper_may_answer_for_an_implementation_that_raises():
    def rescue():
        try:
            return (yield)
        except ZeroDivisionError:
            return [[component(Metric, "rescued")]]

    catalog = catalog_with(one=plugin(lambda: 1 / 0), wrapper=plugin(rescue, wrapper=True))
    assert "rescued" in catalog.metrics and catalog.broken == ()


def test_what_a_wrapper_adds_is_its_own_and_there_once():
    extra = component(CheckpointReader, "extra")

    def add():
        return [*(yield), [extra]]

    alone = plugin(add, "llmpruner_checkpoint_readers", wrapper=True)
    extra_criterion = component(ImportanceCriterion, "extra")

    def add_criterion():
        return [*(yield), [extra_criterion]]

    wrapper = plugin(add_criterion, "llmpruner_importance_criteria", wrapper=True)
    catalog = catalog_with(zoo=Zoo(), wrapper=wrapper, alone=alone)
    assert catalog.criteria.package_of("extra") == "in-process" and catalog.criteria.package_of("taylor") == "llmpruner"
    assert "extra" in catalog_with(alone=alone).readers, "where nothing is there to wrap"
    assert catalog.broken == ()


def raises_before():
    raise ValueError("broken wrapper")
    yield


def raises_after():
    yield
    raise ValueError("broken wrapper")


def yields_twice():
    yield
    yield


def returns_none():
    yield


def returns_classes():
    yield
    return [component(Metric)]


BROKEN_WRAPPERS = {
    "raises before": (plugin(raises_before, wrapper=True), "it raised ValueError: broken wrapper"),
    "raises after": (plugin(raises_after, wrapper=True), "it raised ValueError: broken wrapper"),
    "old, raises before": (plugin(raises_before, hookwrapper=True), "it raised ValueError: broken wrapper"),
    "old, raises after": (plugin(raises_after, hookwrapper=True), "it raised ValueError: broken wrapper"),
    "yields twice": (plugin(yields_twice, wrapper=True), "it raised RuntimeError: wrap_controller"),
    "returns None": (plugin(returns_none, wrapper=True), "it returned None; expected what it was given, a list"),
    "returns classes": (plugin(returns_classes, wrapper=True), "expected a list of classes"),
}


@pytest.mark.parametrize("what", BROKEN_WRAPPERS)
@pytest.mark.filterwarnings("error")
def test_a_broken_wrapper_is_named_and_the_result_without_it_is_used(what):
    wrapper, reason = BROKEN_WRAPPERS[what]
    given = giving(component(Metric), component(Metric, "other"))
    good = plugin(new_wrapper, wrapper=True)
    catalog = catalog_with(one=given, bad=plugin(lambda: 1 / 0), wrapper=wrapper, sound=good)
    assert "other" in catalog.metrics and "zoo" not in catalog.metrics
    found = {broken.name: broken for broken in catalog.broken}
    assert set(found) == {"bad", "wrapper"} and len(catalog.broken) == 2
    assert found["wrapper"].hook == METRICS and reason in found["wrapper"].reason
    assert found["bad"].reason == "it raised ZeroDivisionError: division by zero"


def test_a_wrapper_that_fails_around_one_plugin_has_no_effect_on_any():
    def picky():
        results = yield
        if any(cls.name == "last" for result in results for cls in result):
            raise ValueError("not that one")
        return without_zoo(results)

    first, last = giving(component(Metric)), giving(component(Metric, "last"))
    catalog = catalog_with(a=first, b=last, wrapper=plugin(picky, wrapper=True))
    assert {"zoo", "last"} <= {*catalog.metrics}
    assert [(broken.name, broken.reason) for broken in catalog.broken] == [
        ("wrapper", "it raised ValueError: not that one")
    ]


def test_a_plugin_implements_a_hook_or_wraps_it():
    class Both:
        @hookimpl
        def llmpruner_metrics(self):
            return [component(Metric)]

        @hookimpl(wrapper=True, specname=METRICS)
        def around(self):
            return (yield)

    catalog = catalog_with(both=Both())
    assert "zoo" in catalog.metrics
    (broken,) = catalog.broken
    assert broken.hook == METRICS and "give the wrapper an entry point of its own" in broken.reason


def test_every_call_of_commands_gets_an_application_of_its_own():
    def add(app):
        app.command("feed")(lambda: None)

    broken_wrapper = plugin(raises_after, COMMANDS, wrapper=True)
    host = catalog_with(one=plugin(add, COMMANDS), wrapper=broken_wrapper).host
    (answer,) = host.call(COMMANDS, lambda: {"app": typer.Typer()}, returns=False)
    assert [command.name for command in answer.arguments["app"].registered_commands] == ["feed"]
    assert [broken.name for broken in host.broken] == ["wrapper"]


# Classes


class Required(ComponentSettings):
    power: float


class Refused(ComponentSettings):
    power: float = Field(-1.0, gt=0, validate_default=True)


def needs_more(self, more):
    del more


WRONG = {
    "another kind": (component(Budget), "Zoo", "is no subclass of Metric"),
    "an instance": (component(Metric)(), "<test_plugins", "is no subclass of Metric"),
    "a text": ("zoo", "'zoo'", "'zoo' is no subclass of Metric"),
    "no name": (type("Nameless", (Metric,), {}), "Nameless", "has the name ''; expected lower case text without"),
    "no text": (type("Number", (Metric,), {"name": 3}), "Number", "has the name 3; expected"),
    **{
        f"the name {name!r}": (type("Odd", (Metric,), {"name": name}), "Odd", f"has the name {name!r}; expected")
        for name in ("Zoo", "the zoo", "zoo,", "zoo.power", "zoo=1", "zoo:", " zoo")
    },
    "settings of another sort": (component(Metric, Settings=dict), "Zoo", "its Settings is no subclass of Component"),
    "a required setting": (component(Metric, Settings=Required), "Zoo", "its setting 'power' has no default; every"),
    "a default out of bounds": (
        component(Metric, Settings=Refused),
        "Zoo",
        "power = -1.0 is refused: expected a number above",
    ),
    "arguments": (component(Metric, __init__=needs_more), "Zoo", "it cannot be created without arguments: TypeError"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_class_that_cannot_be_used_is_left_out_alone(what):
    given, item, reason = WRONG[what]
    catalog = catalog_with(one=giving(given, component(Metric, "right")))
    assert "right" in catalog.metrics and "zoo" not in catalog.metrics
    (broken,) = catalog.broken
    assert (broken.name, broken.hook) == ("one", METRICS) and broken.item.startswith(item)
    assert reason in broken.reason
    assert str(broken).startswith(f"plugin 'one' (in-process): {broken.item} of llmpruner_metrics was skipped: ")


def test_one_name_in_two_packages(install):
    install("first-plugin", CRITERION.format(name="same"))
    install("second-plugin", CRITERION.format(name="same"))
    catalog = Catalog(plugin_manager())
    assert "same" not in list(catalog.criteria) and "taylor" in list(catalog.criteria)
    message = "two criterion classes are named 'same': Mine of first-plugin and Mine of second-plugin; block one with "
    with pytest.raises(DuplicateNameError, match=message):
        catalog.criteria["same"]
    with pytest.raises(DuplicateNameError, match=message):
        catalog.create("criterion", "same")
    assert [(b.name, b.hook, b.item) for b in catalog.broken] == [
        (name, "llmpruner_importance_criteria", "Mine") for name in ("first-plugin", "second-plugin")
    ]
    assert all(broken.reason.startswith(message) for broken in catalog.broken)


def test_the_name_of_a_built_in_is_taken_like_any_other():
    catalog = catalog_with(a=giving(component(ImportanceCriterion, "taylor"), hook="llmpruner_importance_criteria"))
    with pytest.raises(DuplicateNameError, match="Taylor of llmpruner and Taylor of in-process"):
        catalog.criteria["taylor"]
    assert "l1" in catalog.criteria


def test_one_class_given_twice_is_one():
    shared = component(Metric)
    catalog = catalog_with(a=giving(shared), b=giving(shared))
    assert catalog.metrics["zoo"] is shared and catalog.broken == ()


class Power(Metric):
    """Its summary is shown instead of this."""

    name = "power"
    summary = "a metric with settings"

    class Settings(ComponentSettings):
        power: float = Field(1.0, gt=0, le=4, description="The power.")
        limit: int | None = Field(None, ge=1, description="Rows.")
        norm: Literal["mean", "max"] = Field("mean", description="How rows are joined.")
        layers: tuple[int, ...] = ()


def test_a_component_is_created_by_name_with_settings():
    catalog = catalog_with(one=giving(Power))
    assert catalog.create("metric", "power", {"power": "2"}).record() == {
        "power": 2.0, "limit": None, "norm": "mean", "layers": []
    }  # fmt: skip
    assert catalog.create(catalog.metrics, "power").settings.power == 1.0
    with pytest.raises(SettingsError, match=r"metric power: power = 9 is refused: expected at most 4"):
        catalog.create(catalog.metrics, "power", {"power": 9})
    with pytest.raises(SettingsError, match="metric power has no setting 'colour'; it has: power, limit, norm, layers"):
        catalog.create("metric", "power", {"colour": "red"})
    with pytest.raises(UnknownNameError, match="unknown metric 'powr'; did you mean power"):
        catalog.create("metric", "powr")
    with pytest.raises(UnknownNameError, match="unknown kind 'metrics'; did you mean metric"):
        catalog.create("metrics", "power")


def test_a_description_holds_every_setting():
    (facts,) = describe(catalog_with(one=giving(Power)), "power")
    assert (facts.kind, facts.name, facts.package) == ("metric", "power", "in-process")
    assert (facts.module, facts.summary) == (__name__, "a metric with settings")
    assert facts.settings == (
        SettingFacts("power", "float", 1.0, "> 0, ≤ 4", "The power."),
        SettingFacts("limit", "int | none", None, "≥ 1", "Rows."),
        SettingFacts("norm", "mean | max", "mean", "", "How rows are joined."),
        SettingFacts("layers", "list of int", [], "", ""),
    )


def test_a_description_covers_every_kind_that_has_the_name():
    catalog = catalog_with(zoo=Zoo())
    assert [facts.kind for facts in describe(catalog, "zoo")] == list(KINDS)
    with pytest.raises(UnknownNameError, match="unknown component 'tailor'; did you mean taylor"):
        describe(catalog, "tailor")


def test_the_summary_of_a_component_is_that_of_its_base_class_only_if_nothing_else_is_there():
    class Cube(Power):
        """The third power.

        More about it."""

    assert summary_of(Cube) == "The third power."
    assert summary_of(type("Plain", (Power,), {})) == summary_of(Power) == "a metric with settings"


def test_every_installed_component_has_a_summary(catalog):
    bare = [f"{r.kind} {name}" for r in catalog.registries for name, cls in r.items() if not cls.summary.strip()]
    assert bare == []


# Families


class Giraffe(ModelFamily):
    name = "giraffe"
    model_types = ("llama",)


class TallGiraffe(Giraffe):
    name = "tall-giraffe"
    extends = "giraffe"


def family(*classes):
    return giving(*classes, hook="llmpruner_model_families")


@pytest.mark.parametrize(
    ("path", "family"), [("models/llama-7b", "llama"), ("vicuna-7b-v1.5", "vicuna"), ("vicuna-7b-v0", "vicuna-v0")]
)
def test_vicuna_wins_over_llama_which_it_extends(catalog, path, family):
    config = LlamaConfig(name_or_path=path)
    assert catalog.families["llama"]().matches(config)
    assert catalog.family_for(config).name == family


def test_the_users_choice_wins(catalog):
    assert catalog.family_for(LlamaConfig(name_or_path="vicuna-7b"), "llama").name == "llama"
    assert catalog.family_for(LlamaConfig(), "auto").name == "auto"
    with pytest.raises(UnknownNameError, match="unknown family 'vicunia'; did you mean vicuna"):
        catalog.family_for(LlamaConfig(), "vicunia")


def test_two_families_of_one_rank_are_both_named():
    catalog = catalog_with(entry_points=True, zoo=family(Giraffe))
    message = r"several families match model type 'llama': giraffe \(in-process\), llama \(llmpruner\); .*--family"
    with pytest.raises(UnsupportedModelError, match=message):
        catalog.family_for(LlamaConfig())
    assert catalog.family_for(LlamaConfig(), "giraffe").name == "giraffe"


@pytest.mark.parametrize("order", [(Giraffe, TallGiraffe), (TallGiraffe, Giraffe)])
def test_neither_order_nor_installation_chooses(order):
    first, second = order
    catalog = catalog_with(one=family(first), two=family(second))
    assert catalog.family_for(LlamaConfig()).name == "tall-giraffe"


def test_what_no_family_matches_is_discovered(catalog, monkeypatch):
    assert catalog.family_for(BertConfig()).name == "auto"
    monkeypatch.setenv("LLMPRUNER_BLOCK", "builtin")
    with pytest.raises(UnsupportedModelError, match="no family matches model type 'bert', and the built-in family"):
        Catalog(plugin_manager()).family_for(BertConfig())


def test_one_reader_may_recognise_a_path():
    catalog = catalog_with(zoo=Zoo())
    assert catalog.reader_for(Path("a.zoo")).name == "zoo"
    assert catalog.reader_for(Path("a.wood")) is None


def raising(error):
    def method(self, *arguments):
        raise error

    return method


@pytest.mark.parametrize("method", ["register_models", "matches"])
@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'x'"), AttributeError("no rope"), SystemExit(1)]
)
def test_a_family_that_raises_is_left_out_alone(method, error):
    broken = component(ModelFamily, model_types=("llama",), extends="giraffe", **{method: raising(error)})
    catalog = catalog_with(one=family(broken), two=family(Giraffe))
    for _ in range(2):
        catalog.register_models()
        assert catalog.family_for(LlamaConfig()).name == "giraffe"
    (record,) = catalog.broken
    reason = f"{method} raised {type(error).__name__}: {error}"
    assert str(record) == f"plugin 'one' (in-process): Zoo of llmpruner_model_families was skipped: {reason}"


def test_a_family_that_cannot_register_its_models_is_named_when_it_is_asked_for():
    broken = component(ModelFamily, register_models=raising(ImportError("no flash\nmore")))
    catalog = catalog_with(one=family(broken))
    catalog.register_models()
    with pytest.raises(
        PluginError, match=r"^family 'zoo' \(in-process\).*: register_models raised ImportError: no flash$"
    ):
        catalog.family_for(LlamaConfig(), "zoo")


def test_a_reader_that_raises_is_left_out_alone():
    broken = component(CheckpointReader, recognises=raising(KeyError("magic")))
    catalog = catalog_with(one=giving(broken, hook="llmpruner_checkpoint_readers"))
    assert catalog.reader_for(Path("a.zoo")) is None
    assert str(catalog.broken[0]).endswith(
        "Zoo of llmpruner_checkpoint_readers was skipped: recognises raised KeyError: 'magic'"
    )


BAD_GROUPS = {
    "None": (lambda self, config: None, "returned None; expected a list of CoupledGroup"),
    "a text": (
        lambda self, config: [*Giraffe().coupled_groups(config), "mlp"],
        "returned 'mlp' in its list; expected Cou",
    ),
    "KeyError": (lambda self, config: {}["n_heads"], "raised KeyError: 'n_heads'"),
    "later": (lambda self, config: (config.no_such_size for _ in range(2)), "raised AttributeError: 'LlamaConfig' "),
}


@pytest.mark.parametrize("what", BAD_GROUPS)
def test_groups_that_are_none_name_the_family_and_its_package(what):
    groups, reason = BAD_GROUPS[what]
    config = LlamaConfig(hidden_size=16, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
    broken = component(ModelFamily, coupled_groups=groups, refresh=lambda self, model, counts: None)()
    for ask in (build_graph, lambda family, config: verify(family, config, shrink=False)):
        with pytest.raises(PluginError) as caught:
            ask(broken, config)
        message = str(caught.value)
        assert message.startswith(f"family 'zoo' of package {__name__.split('.')[0]}: coupled_groups {reason}")
        assert "\n" not in message


def test_an_error_of_discovery_is_not_blamed_on_a_plugin(monkeypatch):
    monkeypatch.setattr("llmpruner.discovery.groups.discover_groups", raising(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):
        build_graph(component(ModelFamily)(), LlamaConfig(num_hidden_layers=1))


WRONG_TYPES = {
    "a text": ("qwen2_moe", "model_types is the text 'qwen2_moe'; expected a tuple: ('qwen2_moe',)"),
    "a number": (3, "model_types is 3; expected a tuple of texts"),
    "a number in it": (("llama", 3), "model_types is ('llama', 3); expected a tuple of texts"),
    "a mapping": ({"llama": 1}, "model_types is {'llama': 1}; expected a tuple of texts"),
}


@pytest.mark.parametrize("what", WRONG_TYPES)
def test_model_types_that_are_no_tuple_of_texts_are_refused(what):
    types, reason = WRONG_TYPES[what]
    catalog = catalog_with(one=family(component(ModelFamily, model_types=types), Giraffe))
    assert list(catalog.families) == ["auto", "giraffe"]
    (broken,) = catalog.broken
    assert (broken.item, broken.reason) == ("Zoo", reason)


@pytest.mark.parametrize("types", [(), ("llama", "glm"), ["llama"], {"llama"}, frozenset({"llama"})])
def test_model_types_may_be_any_collection_of_texts(types):
    catalog = catalog_with(one=family(component(ModelFamily, model_types=types)))
    assert "zoo" in catalog.families and catalog.broken == ()


def test_of_two_that_extend_one_family_the_message_says_what_an_author_does():
    """Neither is known to be the more specific, though one looks at the name of a model and the other at its type."""

    class Named(Giraffe):
        name, extends = "named", "giraffe"

        def matches(self, config):
            return super().matches(config) and config.name_or_path == "named"

    whole = component(ModelFamily, model_types=("llama",), extends="giraffe")
    config = LlamaConfig(name_or_path="named")
    message = (
        r"several .*: named .*, zoo .*; choose with --family; in plugins, name .* with 'extends', or let 'matches'"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        catalog_with(one=family(Giraffe, Named, whole)).family_for(config)
    whole.matches = lambda self, config: config.name_or_path != "named"
    assert catalog_with(one=family(Giraffe, Named, whole)).family_for(config).name == "named"
    whole = component(ModelFamily, model_types=("llama",), extends="named")
    assert catalog_with(one=family(Giraffe, Named, whole)).family_for(config).name == "zoo"


def test_what_a_family_extends_is_a_name():
    catalog = catalog_with(one=family(component(ModelFamily, extends=["giraffe"])))
    assert "zoo" not in catalog.families
    assert catalog.broken[0].reason == "extends is ['giraffe']; expected the name of a family, or None"


def test_a_misspelt_name_of_what_a_family_extends_is_said():
    typo = component(ModelFamily, model_types=("llama",), extends="girafe")
    catalog = catalog_with(one=family(typo, Giraffe))
    message = (
        r"several families match model type 'llama': giraffe \(in-process\), zoo \(in-process\); "
        r"zoo extends 'girafe', which is no known family; did you mean giraffe\?; choose with --family"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        catalog.family_for(LlamaConfig())
