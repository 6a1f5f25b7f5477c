"""The commands that a step of a recipe can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..plugins.catalog import Catalog
from ..settings import (
    BenchSettings,
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    PruneSettings,
    RecoverSettings,
    Settings,
)
from .checks import check_metrics, check_recover, check_text
from .jobs import bench_job, evaluate_job, export_job, prune_job, recover_job

DENSE = "dense"
"""The model of the recipe, among the models that a step reads."""
LAST = "last"
"""The newest checkpoint."""


def _nothing(job: Any) -> None:
    del job


@dataclass(frozen=True)
class Command:
    """``settings``: its model. ``job``: creates the components. ``check``: raises `LlmprunerError` for data that is
    missing or malformed. ``checkpoint``: whether it makes one, which later steps take; ``model``: whether its result
    can be named among ``models``. ``several``: whether it reads several models. ``needs_checkpoint``: whether it takes
    what another step made, not the dense model. ``prompt``: whether it takes one. ``libraries``: distributions, besides
    those of all commands, on whose versions the result depends."""

    name: str
    settings: type[Settings]
    job: Callable[[Any, Catalog], Any]
    check: Callable[[Any], None] = _nothing
    checkpoint: bool = False
    model: bool = False
    several: bool = False
    needs_checkpoint: bool = False
    prompt: bool = False
    libraries: tuple[str, ...] = ()


COMMANDS: Final[Mapping[str, Command]] = {
    command.name: command
    for command in (
        Command("prune", PruneSettings, prune_job, check_text, checkpoint=True, model=True),
        Command(
            "recover", RecoverSettings, recover_job, check_recover, checkpoint=True, model=True,
            libraries=("accelerate", "peft"),
        ),
        Command("evaluate", EvaluateSettings, evaluate_job, check_metrics, several=True, libraries=("lm-eval",)),
        Command(
            "bench", BenchSettings, bench_job, several=True, libraries=("llama-cpp-python", "vllm")
        ),
        Command(
            "generate", GenerateSettings, lambda settings, _: settings, several=True, prompt=True
        ),
        Command(
            "export", ExportSettings, export_job, lambda exporter: exporter.check(), model=True, needs_checkpoint=True,
            libraries=("gguf", "llama-cpp-python", "torchao"),
        ),
    )
}  # fmt: skip
