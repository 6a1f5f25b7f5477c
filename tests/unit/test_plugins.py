"""Finding plugins, checking what they give, and choosing among families."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, LlamaConfig

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
from llmpruner.plugins import hookspecs

TESTS = Path(__file__).parents[1]
HOOKS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("llmpruner_")}


class Giraffe(ModelFamily):
    name = "giraffe"
    model_types = ("llama",)


class TallGiraffe(Giraffe):
    name = "tall-giraffe"
    extends = "giraffe"


class Constant(ImportanceCriterion):
    """One for each."""

    name = "constant"


class Sleep(RecoveryStrategy):
    name = "sleep"


class Stone(CheckpointReader):
    name = "stone"

    def recognises(self, path):
        return path.suffix == ".stone"


class Plugin:
    """Everything at once, as a test registers it in-process."""

    @hookimpl
    def llmpruner_model_families(self):
        return [Giraffe]

    @hookimpl
    def llmpruner_importance_criteria(self):
        return [Constant]

    @hookimpl
    def llmpruner_recovery_strategies(self):
        return (Sleep,)

    @hookimpl
    def llmpruner_checkpoint_readers(self):
        return [Stone]


def catalog_with(**plugins) -> Catalog:
    host = plugin_manager()
    for name, plugin in plugins.items():
        host.manager.register(plugin, name)
    return Catalog(host)


def giving(*classes, hook="llmpruner_model_families"):
    """A plugin with one hook that returns ``classes``."""
    namespace = {hook: hookimpl(lambda self: list(classes))}
    namespace[hook].__name__ = hook
    return type("Giving", (), namespace)()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package with one entry point where Python finds it: what an installer leaves behind, without one."""
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


def test_a_plugin_registered_in_process():
    catalog = catalog_with(zoo=Plugin())
    found = {
        "giraffe": catalog.families,
        "constant": catalog.criteria,
        "sleep": catalog.strategies,
        "stone": catalog.readers,
    }
    for name, registry in found.items():
        assert registry.package_of(name) == "in-process"
    assert catalog.broken == ()
    assert isinstance(catalog.reader_for(Path("a.stone")), Stone)
    assert catalog.reader_for(Path("a.wood")) is None


def test_each_manager_starts_afresh():
    catalog_with(zoo=Plugin())
    assert "giraffe" not in Catalog(plugin_manager()).families
    assert list(Catalog(plugin_manager(entry_points=False)).families) == ["auto"]


def test_installed_plugins_are_found_by_their_entry_points(install):
    install("good-plugin", CRITERION.format(name="good"))
    catalog = Catalog(plugin_manager())
    assert catalog.criteria["good"].__name__ == "Mine"
    assert catalog.criteria.package_of("good") == "good-plugin"
    assert catalog.families.package_of("llama") == "llmpruner"


BREAKS = {
    "an exception": ("raise RuntimeError('no such luck')", "RuntimeError: no such luck"),
    "an exit": ("raise SystemExit('bye')", "SystemExit: bye"),
    "a missing module": ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such"),
    "bad syntax": ("def (:", "SyntaxError: "),
    "a misspelt hook": ("@hookimpl\ndef llmpruner_model_familys(): return []", "unknown hook 'llmpruner_model_f"),
    "another argument": ("@hookimpl\ndef llmpruner_commands(app, door): pass", "{'door'} are declared in the hookimpl"),
    "a hook that raises": (
        "@hookimpl\ndef llmpruner_model_families(): raise ValueError('not today')",
        "llmpruner_model_families raised ValueError: not today",
    ),
    "a hook that returns nothing": (
        "@hookimpl\ndef llmpruner_model_families(): pass", "llmpruner_model_families raised TypeError"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_plugin_is_named_and_skipped(install, what):
    code, reason = BREAKS[what]
    install("a-bad-plugin", code)
    install("good-plugin", CRITERION.format(name="good"))
    catalog = Catalog(plugin_manager())
    (broken,) = catalog.broken
    assert (broken.name, broken.package) == ("a-bad-plugin", "a-bad-plugin")
    assert reason in broken.reason and "\n" not in str(broken)
    assert str(broken).startswith("plugin 'a-bad-plugin' (a-bad-plugin) is broken and was skipped: ")
    assert "good" in catalog.criteria and "llama" in catalog.families and "taylor" in catalog.criteria


def test_a_broken_plugin_is_gone_as_a_whole(install):
    install("bad-plugin", CRITERION.format(name="half") + "@hookimpl\ndef llmpruner_model_familys(): return []")
    catalog = Catalog(plugin_manager())
    assert "half" not in catalog.criteria and len(catalog.broken) == 1


def test_one_name_in_two_packages(install):
    install("first-plugin", CRITERION.format(name="same"))
    install("second-plugin", CRITERION.format(name="same"))
    with pytest.raises(
        DuplicateNameError, match=r"'same'.* of first-plugin and .* of second-plugin; .*LLMPRUNER_BLOCK"
    ):
        Catalog(plugin_manager())


def test_the_name_of_a_builtin_is_taken(install):
    install("my-plugin", CRITERION.format(name="taylor"))
    with pytest.raises(DuplicateNameError, match="'taylor': Taylor of llmpruner and Mine of my-plugin"):
        Catalog(plugin_manager())


def test_two_packages_with_one_entry_point_name(install):
    install("a-plugin", CRITERION.format(name="one"), entry="zoo")
    install("b-plugin", CRITERION.format(name="two"), entry="zoo")
    catalog = Catalog(plugin_manager())
    assert "one" in catalog.criteria and "two" not in catalog.criteria
    (broken,) = catalog.broken
    assert str(broken).startswith("plugin 'zoo' (b-plugin)") and broken.reason.endswith("taken by a plugin of a-plugin")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Constant, r"registers <class .*Constant'> as a family; expected a subclass of ModelFamily"),
        (Giraffe(), r"registers <.*Giraffe object.*> as a family; expected a subclass of ModelFamily"),
        ("giraffe", r"registers 'giraffe' as a family; expected a subclass of ModelFamily"),
        (type("NoName", (ModelFamily,), {}), r"family NoName of in-process has the name ''; expected lower case"),
        (type("Upper", (ModelFamily,), {"name": "Upper"}), r"has the name 'Upper'; expected lower case text"),
    ],
)
def test_what_is_no_family(given, message):
    with pytest.raises(PluginError, match=message):
        catalog_with(zoo=giving(given))


def test_blocking(install, monkeypatch):
    install("good-plugin", "raise RuntimeError('must not be imported')")
    monkeypatch.setenv("LLMPRUNER_BLOCK", "vicuna, good-plugin")
    host = plugin_manager()
    catalog = Catalog(host)
    assert "vicuna" not in catalog.families and "llama" in catalog.families
    assert sorted(host.blocked) == ["good-plugin", "vicuna"] and catalog.broken == ()


def test_tracing(monkeypatch, capsys):
    Catalog(plugin_manager())
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("LLMPRUNER_TRACE", "1")
    Catalog(plugin_manager())
    out, err = capsys.readouterr()
    assert out == ""
    line = next(line for line in err.splitlines() if "llmpruner_model_families of llama" in line)
    assert "LlamaFamily" in line


@pytest.mark.parametrize(
    ("path", "family"), [("models/llama-7b", "llama"), ("vicuna-7b-v1.5", "vicuna"), ("vicuna-7b-v0", "vicuna-v0")]
)
def test_vicuna_wins_over_llama_which_it_extends(catalog, path, family):
    config = LlamaConfig(name_or_path=path)
    assert catalog.families["llama"]().matches(config)
    assert catalog.family_for(config).name == family


def test_the_users_choice_wins(catalog):
    assert catalog.family_for(LlamaConfig(name_or_path="vicuna-7b"), "llama").name == "llama"
    assert catalog.family_for(LlamaConfig(), "vicuna").name == "vicuna"
    with pytest.raises(UnknownNameError, match="unknown family 'vicunia'; did you mean vicuna"):
        catalog.family_for(LlamaConfig(), "vicunia")


def test_two_families_of_one_rank_are_both_named():
    catalog = catalog_with(zoo=Plugin())
    message = r"several families match model type 'llama': giraffe \(in-process\), llama \(llmpruner\); .*--family"
    with pytest.raises(UnsupportedModelError, match=message):
        catalog.family_for(LlamaConfig())
    assert catalog.family_for(LlamaConfig(), "giraffe").name == "giraffe"


@pytest.mark.parametrize("order", [(Giraffe, TallGiraffe), (TallGiraffe, Giraffe)])
def test_neither_order_nor_installation_chooses(order, monkeypatch):
    monkeypatch.setenv("LLMPRUNER_BLOCK", "llama,vicuna")
    first, second = order
    catalog = catalog_with(one=giving(first), two=giving(second))
    assert catalog.family_for(LlamaConfig()).name == "tall-giraffe"


def test_no_family(catalog):
    with pytest.raises(UnsupportedModelError, match=r"no family understands model type 'bert' \(known: .*llama"):
        catalog.family_for(BertConfig())


def test_hooks_are_the_five_that_the_design_names():
    assert sorted(HOOKS) == [
        "llmpruner_checkpoint_readers",
        "llmpruner_commands",
        "llmpruner_importance_criteria",
        "llmpruner_model_families",
        "llmpruner_recovery_strategies",
    ]


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_every_hook_is_documented_and_used_by_a_test(name):
    text = inspect.getdoc(HOOKS[name]) or ""
    assert len(text.splitlines()) > 2, f"{name} needs a docstring that says what to return and what an error does"
    options = HOOKS[name].llmpruner_spec
    assert not options["firstresult"] and not options["historic"]
    assert any(implements(file, name) for file in TESTS.rglob("*.py")), f"no test implements {name}"


def implements(file: Path, hook: str) -> bool:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return any(
        isinstance(node, ast.FunctionDef)
        and node.name == hook
        and any(ast.unparse(decorator).endswith("hookimpl") for decorator in node.decorator_list)
        for node in nodes
    )
