"""The reference agrees with the code: generated pages, hooks, public names, commands and their options."""

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
from docstrings import attributes, document, markdown, methods
from pages import PAGES

import llmpruner

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
APP = cli_page.application()
COMMANDS = dict(cli_page.commands(APP))
BASES = [classes[0] for classes in hooks_page.CLASSES.values() if classes]


@pytest.mark.parametrize("name", sorted(PAGES))
def test_generated_pages_are_what_is_committed(name):
    committed = (DOCS / name).read_text(encoding="utf-8").splitlines()
    assert committed == PAGES[name]().splitlines(), f"docs/{name} is not what the source says; run: python docs/_tools"


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_everything_that_a_plugin_can_set_or_override_is_documented(base):
    missing = [name for name, (_, text) in attributes(base).items() if not text]
    missing += [name for name, member in methods(base).items() if not document(member)]
    assert not missing, f"{base.__name__} does not say what these are for: {', '.join(missing)}"


@pytest.mark.parametrize("hook", hooks_page.CLASSES)
def test_examples_of_hooks_use_public_names_alone(hook):
    """A reader of an example imports from ``llmpruner``, pydantic, torch and the standard library."""
    text = "\n".join(markdown(document(cls)) for cls in hooks_page.CLASSES[hook])
    tree = ast.parse("\n".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    defined |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    defined |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    known = defined | {"Field", "Path", "__file__", "torch", "escape", *dir(builtins), *llmpruner.__all__}
    assert {node.id for node in names} <= known


def test_every_public_function_of_the_api_is_documented():
    public = (getattr(llmpruner, name) for name in llmpruner.__all__)
    functions = {f for f in public if inspect.isfunction(f) and f.__module__ == "llmpruner.api"}
    assert functions == set(api_page.FUNCTIONS)


def test_every_command_is_documented():
    listed = re.findall(r"^## (.+)$", (DOCS / "reference/cli.md").read_text(encoding="utf-8"), re.M)
    assert listed == list(COMMANDS) and {n.split()[0] for n in listed} == set(typer.main.get_command(APP).commands)


def test_options_that_pages_name_exist():
    """In running text too, not only in commands that can be typed."""
    known = {name for command in COMMANDS.values() for p in cli_page.parameters(command.callback) for name in p.names}
    known |= {"--help", "--version", "--debug", "--nproc-per-node"}
    # CSS variables of HTML pages, which the docstring of report sections names.
    known |= {"--accent", "--page", "--dim", "--box", "--text", "--line"}
    for path in [ROOT / "README.md", *DOCS.glob("*.md"), *DOCS.glob("[!_]*/*.md")]:
        text = re.sub(r"^(```+).*?^\1`*$", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
        codes = [
            code for code in re.findall(r"`([^`\n]+)`", text) if not re.match(r"pip|python|torchrun|hf |make", code)
        ]
        named = {option for code in codes for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
        assert named <= known, f"{path.relative_to(ROOT)} names options that no command has: {sorted(named - known)}"
