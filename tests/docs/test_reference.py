"""Pages agree with the code: generated pages, hooks, public names, commands, options, files, recipes, messages."""

import ast
import builtins
import inspect
import json
import re
import runpy
import sys
from pathlib import Path

import api_page
import cli_page
import files_page
import hooks_page
import pytest
import recipes_page
import typer.main
import yaml
from docstrings import attributes, document, markdown, methods
from pages import PAGES

import llmpruner
from llmpruner import NamedRecipe
from llmpruner.recipes.commands import COMMANDS as RECIPE_COMMANDS
from llmpruner.recipes.recipe import Recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TUTORIAL = DOCS / "tutorial"
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


# Files


def test_a_record_has_the_documented_fields(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tiny_model.py", "llama", str(tmp_path / "dense")])
    runpy.run_path(str(TUTORIAL / "tiny_model.py"))
    pruned, data = tmp_path / "pruned", TUTORIAL / "lines.jsonl"
    llmpruner.prune(tmp_path / "dense", ratio=0.2, importance="l1", output=pruned)
    record = json.loads((pruned / "llmpruner.json").read_text(encoding="utf-8"))
    assert record.keys() == files_page.RECORD.keys() - {"recovery", "adapters"}
    assert record["plans"][0].keys() == llmpruner.PruningPlan.model_fields.keys()
    (work,) = record["work"]
    assert work == {"fits": []}
    assert json.loads((pruned / "run.json").read_text(encoding="utf-8")).keys() == files_page.RUN.keys() - {"step"}
    llmpruner.recover(pruned, data=str(data), max_steps=1, batch_size=2, output=tmp_path / "recovered")
    record = json.loads((tmp_path / "recovered" / "llmpruner.json").read_text(encoding="utf-8"))
    assert record.keys() == files_page.RECORD.keys() - {"adapters"}
    assert record["recovery"][0].keys() == files_page.RECOVERY.keys()
    llmpruner.export(tmp_path / "dense", to="stock", output=tmp_path / "stock")
    origin = json.loads((tmp_path / "stock" / "llmpruner-files.json").read_text(encoding="utf-8"))
    assert origin.keys() == files_page.ORIGIN.keys() - {"format"}
    llmpruner.export(tmp_path / "dense", to="nemotron-nas", output=tmp_path / "served")
    origin = json.loads((tmp_path / "served" / "llmpruner-files.json").read_text(encoding="utf-8"))
    assert origin.keys() == files_page.ORIGIN.keys()


# Recipes

RECIPE_PAGES = ("how-to/recipes.md", "reference/recipes.md")
RECIPES = [
    (page, number, text)
    for page in RECIPE_PAGES
    for number, text in enumerate(re.findall(r"^```yaml\n(.*?)^```", (DOCS / page).read_text("utf-8"), re.S | re.M))
]


@pytest.mark.parametrize(("page", "number", "text"), RECIPES, ids=[f"{page} {number}" for page, number, _ in RECIPES])
def test_recipes_on_pages_are_valid(page, number, text, catalog):
    assert len(Recipe.read(yaml.safe_load(text), catalog).steps) > 1


def test_there_are_recipes_on_both_pages(catalog):
    assert {page for page, _, _ in RECIPES} == set(RECIPE_PAGES)
    listed = re.findall(r"^\| `([\w-]+)` \| .*\|$", (DOCS / RECIPE_PAGES[0]).read_text("utf-8"), re.M)
    own = {name for name, _ in catalog[NamedRecipe].items() if catalog[NamedRecipe].package_of(name) == "llmpruner"}
    assert set(listed) == own and set(recipes_page.FOLDERS) == set(RECIPE_COMMANDS)


# Messages

QUOTED = re.findall(r"```text\n(.*?)```", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.S)


def test_messages_that_the_page_on_troubleshooting_quotes_are_raised_somewhere():
    """In the page, what an f-string fills in is ``…``."""
    sources = ""
    for file in (ROOT / "llmpruner").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                sources += "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values) + "\n"
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                sources += node.value + "\n"
    assert len(QUOTED) > 10
    for message in map(str.strip, QUOTED):
        fragments = [part.strip(" ;:'(),") for part in message.split("…")]
        assert len("".join(fragments)) > 10
        missing = [part for part in fragments if part not in sources]
        assert not missing, f"docs/troubleshooting.md quotes what no source contains: {missing}"
