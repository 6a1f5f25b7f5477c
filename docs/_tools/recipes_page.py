"""The reference of recipe files, from their settings models, and the recipes that llmpruner brings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from docstrings import markdown
from installed import own_manager
from settings_table import cell

from llmpruner import Catalog, NamedRecipe
from llmpruner.recipes.commands import COMMANDS, MEASURES
from llmpruner.settings import RecipeSettings, Settings, StepSettings

FOLDERS = {
    "prune": "the checkpoint",
    "recover": "the checkpoint",
    "evaluate": "`results.json`, as `evaluate --json` writes it",
    "bench": "`results.json`, as `bench --json` writes it",
    "generate": "`results.json`: a list with `name`, `prompt` and `text`",
    "export": "the files of the format",
}
"""Command → what its folder holds."""
FILES = {
    "NAME": "The result of the step NAME, once it is whole.",
    "NAME/run.json": "Under `step`: the inputs of the step, seconds, and facts about its result.",
    "NAME.DIGEST…": "What an interrupted step has done so far, by a digest of its inputs; removed at its end.",
}
"""File in the output → what it is."""


def render() -> str:
    lines = [
        "# Recipe files",
        "",
        INTRODUCTION,
        "",
        *_table("key", _fields(RecipeSettings)),
        "",
        "## Steps",
        "",
        STEPS,
        "",
    ]
    lines += ["| command | settings | reads | its folder holds |", "|---|---|---|---|", *_commands()]
    lines += ["", BESIDE, "", *_table("key", _fields(StepSettings)), "", ROUNDS, "", "```yaml", EXAMPLE, "```"]
    lines += ["", "## The output", "", *_table("file", FILES.items()), "", INPUTS]
    lines += ["", "## Recipes of llmpruner", "", "`${llmpruner}` in them is the folder of the package."]
    for cls in Catalog(own_manager())[NamedRecipe].values():
        text = cls.path.read_text(encoding="utf-8")
        lines += ["", f"### {cls.name}", "", markdown(cls.summary) + ".", "", "```yaml", text.rstrip(), "```"]
    return "\n".join(lines) + "\n"


INTRODUCTION = (
    "What `llmpruner run` reads: a YAML file, or the same keys as a mapping in Python "
    "([`run_recipe`](api.md#run_recipe)). "
    "[Recipes](../how-to/recipes.md) shows how they are used. Unknown keys are refused, with the step. "
    "An empty value counts as not given. Relative paths are relative to the folder in which the command "
    "runs."
)
STEPS = (
    "Each step has one command, whose value holds settings of the command of that name, by the names that Python uses:"
)
BESIDE = "Beside the command, a step may have:"
ROUNDS = (
    "`rounds: N` with `steps` stands for these steps N times. Each prune removes a share of what is left, and each "
    "step continues from the newest checkpoint."
)
EXAMPLE = """\
model: MODEL
steps:
  - rounds: 3
    steps:
      - prune: {ratio: 0.1}
      - recover: {data: alpaca.jsonl, max_steps: 200}
  - evaluate: {perplexity: text.txt}
    models: [dense, last]
    name: quality"""
INPUTS = (
    "The inputs of a step are its settings with all defaults, how models are opened, the files of the models that it "
    "reads (of a hub model its commit), and the data files that its settings name. A step with the same inputs is "
    "skipped; with others it is done again."
)


def _commands() -> Iterator[str]:
    for name in COMMANDS:
        reads = "the newest checkpoint, or the dense model"
        if name in MEASURES:
            reads = "the dense model and all checkpoints so far, or those under `models`"
        yield f"| `{name}` | the options of [`{name}`](cli.md#{name}) | {reads} | {FOLDERS[name]} |"


def _fields(model: type[Settings]) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        yield name, markdown(field.description or "")


def _table(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    return [f"| {title} | what it is |", "|---|---|", *(f"| `{name}` | {cell(text)} |" for name, text in rows)]
