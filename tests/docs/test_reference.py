"""The reference agrees with the code: generated pages, hooks and their promise, the API, commands and their options."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
from pathlib import Path

import api_page
import cli_page
import hooks_page
import pytest
import typer.main
from docstrings import attributes, document, function_of, markdown, methods
from pages import PAGES
from typer.testing import CliRunner

import llmpruner
from llmpruner.evaluation.metrics import PerplexityMetric, TasksMetric
from llmpruner.pruning.budgets.sizes import Macs
from llmpruner.recovery.lora import LoraStrategy
from llmpruner.settings import EvaluateSettings, PruneSettings, RecoverSettings, option_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

APP = cli_page.application()
COMMANDS = dict(cli_page.commands(APP))
BASES = [classes[0] for classes in hooks_page.CLASSES.values() if classes]


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """What stands under the heading ``title``, up to the next one of its level."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |\Z)", text, re.S | re.M)
    assert found, f"no section '{title}'"
    return found[2]


def shown_help(name: str) -> str:
    """What ``llmpruner NAME --help`` prints, as one line without the frames around it."""
    runner = CliRunner(env={"TERM": "dumb", "NO_COLOR": "1"})
    result = runner.invoke(APP, [*name.split(), "--help"])
    assert result.exit_code == 0, result.output
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    import typer.rich_utils

    monkeypatch.setattr(typer.rich_utils, "MAX_WIDTH", 4000)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_generated_pages_are_what_is_committed(name):
    expected, committed = PAGES[name]().splitlines(), page(name).splitlines()
    for number, (is_, should) in enumerate(zip(committed, expected, strict=False), 1):
        assert is_ == should, f"docs/{name}, line {number}, is not what the source says; run: python docs/_tools"
    assert len(committed) == len(expected), f"docs/{name} has another length than its source; run: python docs/_tools"


@pytest.mark.parametrize("name", sorted(hooks_page.hooks()))
def test_a_hook_says_what_its_implementer_must_know(name):
    text = document(hooks_page.hooks()[name])
    for what in ("Returns:", "Called:", "Errors:"):
        assert re.search(rf"^{what}", text, re.M), f"the docstring of hook {name} has no paragraph '{what}'"


@pytest.mark.parametrize("name", sorted(hooks_page.hooks()))
def test_the_documented_signature_of_a_hook_is_that_of_the_code(name):
    shown = re.search(rf"^def {name}(\(.*)$", section(page("reference/hooks.md"), name), re.M)
    assert shown, f"docs/reference/hooks.md shows no signature of {name}"
    written = f"def f{shown[1]}: ..."
    names: dict = {}
    exec(f"from __future__ import annotations\n{written}", names)
    assert inspect.signature(names["f"]) == inspect.signature(hooks_page.hooks()[name]), (
        f"docs/reference/hooks.md: the signature of {name} differs from llmpruner/plugins/hookspecs.py"
    )


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_everything_that_a_plugin_can_set_or_override_is_documented(base):
    missing = [name for name, (_, text) in attributes(base).items() if not text]
    missing += [name for name, member in methods(base).items() if not document(member)]
    assert not missing, f"{base.__name__} does not say what these are for: {', '.join(missing)}"


@pytest.mark.parametrize("hook", hooks_page.CLASSES)
def test_examples_of_hooks_use_public_names_alone(hook):
    """A reader of an example imports from ``llmpruner``, pydantic, torch and the standard library."""
    text = "\n".join(markdown(document(cls)) for cls in hooks_page.CLASSES[hook])
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))
    names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    defined = {node.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    defined |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    defined |= {node.arg for node in ast.walk(ast.parse(code)) if isinstance(node, ast.arg)}
    elsewhere = {"Field", "torch", "escape", *dir(builtins)}
    unknown = {node.id for node in names} - defined - elsewhere - set(llmpruner.__all__)
    assert not unknown, f"the example of {hook} uses what no reader can import: {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_public_classes_that_a_plugin_is_given_are_described(base):
    pages = page("reference/hooks.md") + page("reference/structure.md") + page("reference/api.md")
    for name, member in methods(base).items():
        types = set(re.findall(r"\w+", " ".join(map(str, function_of(member).__annotations__.values()))))
        for one in types & set(llmpruner.__all__):
            assert re.search(rf"^#+ {one}$", pages, re.M), f"{base.__name__}.{name} has {one}, which no page describes"


def test_settings_that_functions_are_given_are_public_and_described():
    for function in api_page.FUNCTIONS:
        for name in set(re.findall(r"\w+Settings", str(function.__annotations__))):
            assert name in llmpruner.__all__, f"llmpruner.{function.__name__} takes {name}, which is not public"
            assert re.search(rf"^### {name}$", page("reference/api.md"), re.M), f"no page describes {name}"


def test_every_public_function_of_the_api_is_documented():
    shown = {function.__name__ for function in api_page.FUNCTIONS}
    public = {name: getattr(llmpruner, name) for name in llmpruner.__all__}
    functions = {n for n, f in public.items() if inspect.isfunction(f) and f.__module__ == "llmpruner.api"}
    assert functions and functions <= shown, f"docs/_tools/api_page.py leaves out {sorted(functions - shown)}"


def test_every_command_is_documented():
    listed = re.findall(r"^## (.+)$", page("reference/cli.md"), re.M)
    click = typer.main.get_command(APP)
    assert listed == list(COMMANDS) and {name.split()[0] for name in listed} == set(click.commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_page_say_the_same(name):
    """Compared with what is printed, so that a mistake of the generator shows as well."""
    shown, written = shown_help(name), section(page("reference/cli.md"), name)
    documented = dict(re.findall(r"^- (`-.*?`): (.*)$", written, re.M))
    options = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", " ".join(documented)))
    printed = set(re.findall(r"(?<= )--[a-z][\w-]*(?= )", _without_prose(shown))) - {"--help"}
    options = {option for option in options if option.startswith("--")}
    assert not options - printed, f"{name}: the page has {sorted(options - printed)}, --help has not"
    assert not printed - options, f"{name}: --help has {sorted(printed - options)}, the page has not"
    for option, text in documented.items():
        told = re.sub(r"( \*Required\.\*)?( \*Default:\* `.*?`\.)?$", "", text)
        assert told in shown, f"{name} {option}: the page says '{told}', --help does not"


@pytest.mark.parametrize(
    ("model", "owner", "component", "keys"),
    [
        (RecoverSettings, "strategy", LoraStrategy, {"rank", "alpha", "dropout"}),
        (EvaluateSettings, "perplexity", PerplexityMetric, {"window"}),
        (EvaluateSettings, "tasks", TasksMetric, {"batch_size"}),
        (PruneSettings, "budget", Macs, {"context"}),
    ],
)
def test_defaults_that_a_help_text_names_are_those_of_the_component(model, owner, component, keys):
    told = {}
    for name, field in model.model_fields.items():
        found = re.search(r"[Bb]y default (?:α is )?(\d+(?:\.\d+)?)", field.description)
        of, _, key = (option_of(model, name).sets or "").partition(".")
        if found and of == owner:
            told[key] = float(found[1])
    assert told == {key: component.Settings.model_fields[key].default for key in keys}


def _without_prose(shown: str) -> str:
    """Option tables without the texts beside them, which may name options of other commands."""
    for command in COMMANDS.values():
        for parameter in cli_page.parameters(command.callback):
            shown = shown.replace(cli_page._plain(parameter.help), " ")
    return shown


def test_options_that_pages_name_exist():
    """In running text too, not only in commands that can be typed."""
    known = {name for command in COMMANDS.values() for p in cli_page.parameters(command.callback) for name in p.names}
    known |= {"--help", "--version", "--debug"}
    # CSS variables of HTML pages, which the docstring of report sections names.
    known |= set(re.findall(r"--\w+(?=:)", (ROOT / "llmpruner/report/page.html.j2").read_text(encoding="utf-8")))
    for path in [ROOT / "README.md", *DOCS.glob("*.md"), *DOCS.glob("[!_]*/*.md")]:
        text = re.sub(r"^(```+).*?^\1`*$", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
        named = {o for code in re.findall(r"`([^`\n]+)`", text) for o in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
        assert named <= known, f"{path.relative_to(ROOT)} names options that no command has: {sorted(named - known)}"
