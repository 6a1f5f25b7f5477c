"""Two options together: each has an effect on the job, or one line says that it has none.

A job is all that a stage reads, so changing the value of an option must change the job, or be refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from llmpruner import Catalog, LlmprunerError, plugin_manager
from llmpruner.component import Component
from llmpruner.recipes.jobs import evaluate_job, prune_job, recover_job
from llmpruner.settings import EvaluateSettings, PruneSettings, RecoverSettings, Settings, flag_of, settings_from

CATALOG = Catalog(plugin_manager())


@dataclass(frozen=True)
class Command:
    """``base``: what must be given. ``values``: two or more valid values of every option, the first ones tried
    together, the others to see whether a change shows."""

    model: type[Settings]
    job: Callable[[Any, Catalog], Any]
    base: Mapping[str, Any]
    values: Mapping[str, tuple[Any, ...]]


PRUNE = Command(
    PruneSettings,
    prune_job,
    {"ratio": 0.2},
    {
        "ratio": (0.2, 0.3),
        "budget": ("bytes", "macs", "latency"),
        "context": (128, 256),
        "target_params": ("5M", "4M"),
        "unit_ratio": (0.25, 0.5),
        "kinds": ("mlp,attention", "layer", "hidden"),
        "layers": ("1-2", "all"),
        "shape": ("free", "uniform"),
        "round_to": (8, 4),
        "meet": ("above", "below"),
        "method": ("fast", "best", "llm-pruner"),
        "importance": ("taylor", "l2", "energy", "block-influence"),
        "variant": ("mix", "vector"),
        "reduction": ("mean", "max"),
        "allocation": ("global", "search", "uniform"),
        "normalize": ("mean", "cost"),
        "steps": (2, 3),
        "compensate": ("refit", "bias", "none"),
        "calibration": ("self", "text.txt", "self,text.txt"),
        "samples": (4, 8),
        "length": (16, 32),
        "seed": (1, 2),
        "settings": ({"refit": {"mix": 0.3}}, {"taylor": {"variant": "element2"}}, {"search": {"rounds": 1}}),
    },
)
RECOVER = Command(
    RecoverSettings,
    recover_job,
    {"data": "a.jsonl"},
    {
        "data": ("a.jsonl", "b.jsonl"),
        "strategy": ("full", "lora"),
        "limit": (10, 20),
        "merge": (False, True),
        "rank": (4, 16),
        "alpha": (8, 32),
        "dropout": (0.1, 0.0),
        "learning_rate": (1e-3, 1e-4),
        "epochs": (1.0, 3.0),
        "max_steps": (5, 6),
        "batch_size": (8, 16),
        "micro_batch_size": (2, 4),
        "cutoff": (64, 128),
        "pack": (True, False),
        "warmup_steps": (3, 4),
        "loss_on": ("answers", "all"),
        "autocast": (True, False),
        "schedule": ("cosine", "linear"),
        "weight_decay": (0.1, 0.0),
        "minutes": (5.0, 10.0),
        "gradient_checkpointing": ("on", "off"),
        "validation": (0.1, 0, 20),
        "validation_data": ("c.jsonl", "d.jsonl"),
        "eval_steps": (5, 10),
        "patience": (2, 3),
        "report_to": ("tensorboard", "wandb"),
        "seed": (1, 2),
        "settings": ({"lora": {"rank": 2}}, {"lora": {"alpha": 3}}),
    },
)
EVALUATE = Command(
    EvaluateSettings,
    evaluate_job,
    {},
    {
        "tasks": ("piqa", "arc_easy"),
        "perplexity": ("a.txt", "b.txt"),
        "window": (64, 128),
        "tokens": (256, 512),
        "kl": (True, False),
        "speed": (True, False),
        "metrics": ("speed", "perplexity"),
        "limit": (3, 4),
        "num_fewshot": (1, 2),
        "include_path": ("tasks", "other"),
        "batch_size": (2, 4),
        "autocast": (True, False),
        "seed": (1, 2),
        "settings": ({"perplexity": {"window": 32}}, {"speed": {"runs": 2}}),
    },
)
COMMANDS = {"prune": PRUNE, "recover": RECOVER, "evaluate": EVALUATE}
PAIRS = [(name, *pair) for name, command in COMMANDS.items() for pair in combinations(command.values, 2)]


def seen(value: Any) -> Any:
    """A job as plain values: components by name and settings."""
    if isinstance(value, Component):
        return value.name, value.record()
    if isinstance(value, Settings):
        # What is short for a component's setting shows in the component.
        own = {n for n in type(value).model_fields if "." in (flag(value, n) or "")}
        return {n: v for n, v in value.model_dump().items() if n not in own and n != "settings"}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: seen(getattr(value, f.name)) for f in fields(value)}
    return [seen(v) for v in value] if isinstance(value, (list, tuple)) else value


def flag(value: Settings, name: str) -> str | None:
    from llmpruner.settings import option_of

    return option_of(type(value), name).sets


def outcome(command: Command, given: Mapping[str, Any]) -> Any:
    """The job, or the message of the refusal."""
    try:
        return seen(command.job(settings_from(command.model, {**given}), CATALOG))
    except LlmprunerError as error:
        return str(error)


def test_every_option_is_tried():
    for command in COMMANDS.values():
        assert set(command.values) == set(command.model.model_fields)
    assert len(PAIRS) == 722


@pytest.mark.parametrize(("name", "one", "other"), PAIRS)
def test_two_options_have_an_effect_or_a_message(name, one, other):
    command = COMMANDS[name]
    amounts = {"ratio", "target_params", "unit_ratio"}
    base = {} if {one, other} & amounts else command.base
    for first in command.values[one]:
        for second in command.values[other]:
            given = {**base, one: first, other: second}
            found = outcome(command, given)
            if isinstance(found, str):
                assert "\n" not in found
                flags = [flag_of(command.model, option) for option in (one, other)]
                assert any(f in found or f.replace("--", "--no-", 1) in found for f in flags), found
                continue
            for option in (one, other):
                changed = [outcome(command, {**given, option: v}) for v in command.values[option] if v != given[option]]
                assert any(result != found for result in changed), f"{option} changes nothing in {given}"


@pytest.mark.parametrize(
    ("model", "name"),
    [(PruneSettings, "calibration"), (RecoverSettings, "data"), (RecoverSettings, "validation_data"),
     (EvaluateSettings, "perplexity")],
)  # fmt: skip
def test_the_name_of_a_text_may_be_a_path(model, name):
    given = settings_from(model, {name: Path("texts") / "a.txt"})
    assert given.given() == {name: str(Path("texts/a.txt"))}
