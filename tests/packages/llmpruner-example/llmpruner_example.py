"""A plugin that uses every hook of llmpruner once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from llmpruner import (
    CheckpointReader,
    ImportanceCriterion,
    ModelFamily,
    ParameterSignals,
    RecoveryJob,
    RecoveryStrategy,
    TrainingResult,
    hookimpl,
)


class ExampleFamily(ModelFamily):
    """A family for a model type that nothing else understands."""

    name = "example"
    model_types = ("example-type",)


class Inverse(ImportanceCriterion):
    """The reverse of l1: large weights go first."""

    name = "example-inverse"
    summary = "1 / (1 + |w|): the reverse of l1, one weight at a time"

    def saliency(self, signals: ParameterSignals) -> Any:
        return 1 / (1 + signals.weight.abs())


class Nothing(RecoveryStrategy):
    """Leaves the model as it is."""

    name = "example-nothing"
    summary = "no training at all"

    def train(self, job: RecoveryJob) -> TrainingResult:
        return TrainingResult(job.model, (), 0)


class PointerReader(CheckpointReader):
    """A folder with a file ``pointer.txt`` that names the folder of the real model."""

    name = "example-pointer"

    def recognises(self, path: Path) -> bool:
        return (path / "pointer.txt").is_file()

    def read_config(self, path: Path) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self._target(path))

    def read_model(self, path: Path, dtype: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self._target(path), dtype=dtype)

    def read_tokenizer(self, path: Path) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._target(path))

    def _target(self, path: Path) -> str:
        return (path / "pointer.txt").read_text(encoding="utf-8").strip()


@hookimpl
def llmpruner_model_families() -> list[type[ModelFamily]]:
    return [ExampleFamily]


@hookimpl
def llmpruner_importance_criteria() -> list[type[ImportanceCriterion]]:
    return [Inverse]


@hookimpl
def llmpruner_recovery_strategies() -> list[type[RecoveryStrategy]]:
    return [Nothing]


@hookimpl
def llmpruner_checkpoint_readers() -> list[type[CheckpointReader]]:
    return [PointerReader]


@hookimpl
def llmpruner_commands(app: typer.Typer) -> None:
    @app.command()
    def example_hello(name: str = "world") -> None:
        """Greet someone."""
        typer.echo(f"hello, {name}")
