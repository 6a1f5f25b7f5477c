"""The reference of the files that llmpruner writes beside weights: plans, and ``llmpruner.json``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from docstrings import document, markdown
from pydantic import BaseModel
from settings_table import table

from llmpruner.structure import plan
from llmpruner.structure.plan import PruningPlan

RECORD = {
    "llmpruner": "Version of llmpruner that wrote the checkpoint.",
    "plans": "The plans that were applied, oldest first, each as in a plan file. The first was made for the dense "
    "model, each later one for what the plans before it leave.",
    "base_config": "`config.json` of the dense model, from which the structure of the pruned one follows. Numbers that "
    'JSON does not have are stated as transformers does: `{"__float__": "Infinity"}`.',
    "adapters": "Names of the adapters, on a pruned model, that its weights contain. Absent without any.",
    "base_path": "Absolute path of the dense model's files; absent for a hub id and the demo model.",
    "base_weights": "SHA-256 over samples of the dense model's files with weights, where they were local: `recover` "
    "and `verify` warn where they find others. Absent in checkpoints of earlier versions.",
    "files": "Path → `bytes` and `sha256` of every other file of the checkpoint, as it was saved; "
    "[`llmpruner verify`](../how-to/verify.md) compares them. Absent in checkpoints of earlier versions.",
    "work": "One for each of the plans: its [fits](#work); `tokens` where the vocabulary was cut: a "
    "[`TokenOutcome`](api.md#tokenoutcome); and `quality` where it was measured: a [`Quality`](api.md#quality).",
    "recovery": "The trainings that were run, oldest first; absent where there were none.",
}
"""Key → what it is."""
FITS = {
    "parameter": "The weight matrix, or the stack that it is in.",
    "slot": "Number of the expert in a stack of matrices; null for one matrix.",
    "rows": "Tokens in the fit.",
    "ridge": "As a share of the mean diagonal of the inputs' Gram matrix; null where no fit was better than the old "
    "weights.",
    "before": "Squared error of the outputs on held-out tokens with the old weights of the inputs that stay, as a "
    "share of the targets' mean square; null where it was not computed.",
    "after": "The same with the fitted weights.",
}
"""Key of an element of ``work[…].fits`` → what it is."""
RUN = {
    "command": "`prune` or `recover`.",
    "model": "The model that was read, as the user named it.",
    "settings": "The settings that the user gave.",
    "stages": "The stages in their order: `name`, `seconds`, and `peak_bytes`, the most memory that the process had "
    "taken by the end of the stage. What an interrupted run had done before is not among them.",
    "seconds": "From the start of the command until it was saved; of a call from Python, of all stages.",
    "machine": "System, processor, cores, bytes of memory, and the device that computed.",
    "versions": "Versions of Python and of the libraries that results depend on most.",
    "step": "The step of a [recipe](recipes.md#the-output) that made the folder: its `number`, `name`, `inputs`, "
    "`seconds` and `result`; absent in others. Folders of other steps have it with `command` and `settings`.",
}
"""Key of ``run.json`` → what it is."""
ORIGIN = {
    "llmpruner": "Version of llmpruner that wrote the directory.",
    "files": "As in `llmpruner.json`.",
    "exported_from": "The checkpoint that was exported, as the user named it.",
    "format": "The exporter (such as `nemotron-nas`) whose format llmpruner does not open: `verify` checks files, "
    "tensors and values alone; absent in others.",
}
"""Key of ``llmpruner-files.json`` → what it is."""
RECOVERY = {
    "strategy": "Name of the recovery strategy.",
    "strategy_settings": "Its settings, as in `--set`.",
    "settings": "Those settings of [`recover`](cli.md#recover) that all strategies share.",
    "data": "The instruction data, as the user named it.",
    "fingerprint": "SHA-256 of the data.",
    "examples": "How many examples were trained on.",
    "trainable_parameters": "How many parameters were trained.",
    "losses": "Loss of every optimizer step: mean over its trained tokens, in nats.",
    "held_out": "Whether the examples of the validations were held back; else some that were trained on.",
    "validation_examples": "How many examples were validated on.",
    "validation": "Each validation: `step`, the number of steps taken; `loss`, as above, on these examples; `error`, "
    "the standard error of its difference from the first.",
    "best_step": "The number of steps after which the weights were taken, as that loss was lowest then; 0 where none "
    "was lower than the first by more than its error; null where the strategy measured none.",
    "improved": "Whether that is after a step, so that the training helped.",
}
"""Key of an element of ``recovery`` → what it is."""


def render() -> str:
    lines = ["# Files", "", INTRODUCTION, "", "## The plan", "", *_paragraph(plan), *_models(PruningPlan, 3)]
    lines += ["", "## llmpruner.json", "", RECORD_TEXT, "", *_keys(RECORD)]
    lines += ["", "### work", "", WORK_TEXT, "", "Each of the `fits`:", "", *_keys(FITS)]
    lines += ["", "### recovery", "", "Each element has these fields:", "", *_keys(RECOVERY)]
    lines += ["", "## llmpruner-files.json", "", ORIGIN_TEXT, "", *_keys(ORIGIN)]
    lines += ["", "## run.json", "", RUN_TEXT, "", *_keys(RUN)]
    return "\n".join(lines) + "\n"


INTRODUCTION = (
    "Two files hold how a model was pruned: the plan, which `llmpruner plan -o` writes and `prune --plan` follows, and "
    "`llmpruner.json` in every checkpoint that llmpruner saves. Both are JSON in UTF-8. Numbers of units and of "
    "layers are written as text, in runs: `0-4,7`. A plan with an unknown field, or of another version, is refused."
)
WORK_TEXT = "What the compensation of each plan did."
ORIGIN_TEXT = (
    "Beside an export of a dense model, or for other programs: where it comes from, and its hashes, by which "
    "[`llmpruner verify`](../how-to/verify.md) and every command that loads it find damage. "
    "transformers does not read it."
)
RUN_TEXT = (
    "What it took to make a checkpoint, beside its `llmpruner.json`. No result depends on it; recipes and `push` leave "
    "it aside, as they do `report.html`."
)
RECORD_TEXT = (
    "What a checkpoint keeps of how it was made, so that it can be pruned again, and so that its layers can be built."
)


def _models(model: type[BaseModel], level: int) -> Iterator[str]:
    yield from table(model, "field", links=True)
    for inside in _inside(model):
        yield from _model(inside, level)


def _model(model: type[BaseModel], level: int) -> Iterator[str]:
    yield from ("", f"{'#' * level} {model.__name__}", "", *_paragraph(model), *table(model, "field", links=True))


def _inside(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The models that fields of ``model`` hold, at any depth, each once and in order."""
    found: dict[type[BaseModel], None] = {}
    for field in model.model_fields.values():
        for inside in _models_of(field.annotation):
            found.setdefault(inside)
            found.update(dict.fromkeys(_inside(inside)))
    return list(found)


def _models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_of(argument)


def _paragraph(thing: Any) -> list[str]:
    text = document(thing).removeprefix("PruningPlan: ")
    text = text[:1].upper() + text[1:]
    return [markdown(text), ""] if text else []


def _keys(keys: dict[str, str]) -> list[str]:
    return ["| field | what it is |", "|---|---|", *(f"| `{key}` | {text} |" for key, text in keys.items())]
