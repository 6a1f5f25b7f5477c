"""Exporter: writes a checkpoint in the format of another runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..component import Component
from ..progress import QUIET, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..discovery.family import ModelFamily
    from ..structure.plan import PruningPlan


class ExportSource(Protocol):
    """The loaded checkpoint. ``tokenizer``: None where it has none. ``config``: of the dense model, before all cuts.
    ``plans``: the cuts that were applied. ``record``: its ``llmpruner.json``, None for a dense model."""

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def tokenizer(self) -> Any | None: ...

    @property
    def family(self) -> ModelFamily: ...

    @property
    def config(self) -> PreTrainedConfig: ...

    @property
    def plans(self) -> Sequence[PruningPlan]: ...

    @property
    def record(self) -> Mapping[str, Any] | None: ...


@dataclass(frozen=True)
class ExportTask:
    """``source``: the directory of the checkpoint, or a file (see `Exporter.takes_files`). ``directory``: new and
    empty; renamed to its final name when `Exporter.export` returns, and removed when it raises. ``load``: loads the
    source; called when `loaded` or `model` is first read, so that an exporter which streams tensors from ``source``
    needs no memory for the model. ``dtype``: "float32", "bfloat16" or "float16", where the user asked for it
    (``--dtype``); None for the dtype of the checkpoint."""

    source: Path
    directory: Path
    load: Callable[[], ExportSource]
    progress: Progress = QUIET
    dtype: str | None = None

    @cached_property
    def loaded(self) -> ExportSource:
        """The checkpoint with its weights, loaded when this is first read."""
        return self.load()

    @property
    def model(self) -> PreTrainedModel:
        """In evaluation mode."""
        return self.loaded.model


class Exporter(Component):
    """Writes one format. `export` must check what it wrote, by loading it or by comparing outputs.

    ::

        class Weights(Exporter):
            name = "weights"
            summary = "the state dict alone, as PyTorch saves it"

            class Settings(ComponentSettings):
                file: str = Field("weights.pt", description="Name of the file.")

            settings: Settings

            def export(self, task):
                state = task.model.state_dict()
                torch.save(state, task.directory / self.settings.file)
                written = torch.load(task.directory / self.settings.file, weights_only=True)
                if any(not torch.equal(written[name], tensor) for name, tensor in state.items()):
                    raise OutputError("the written weights differ from the model's")
                return "torch.load reads it"
    """

    kind: ClassVar[str] = "exporter"
    takes_files: ClassVar[bool] = False
    """Whether the source may also be a .gguf file instead of a directory. `ExportTask.load` reads either."""
    keeps_dtype: ClassVar[bool] = False
    """Whether weights are written in the dtype of `ExportTask.model`. Those that are stored in float16 are then loaded
    in float16 on a CPU, too; otherwise in float32, in which a CPU computes."""

    def check(self) -> None:
        """Raise `MissingExtraError` for a library that is not installed, and `SettingsError` for settings that do not
        go together: before models are made that are to be exported. Checks nothing by default."""

    def export(self, task: ExportTask) -> str:
        """Write into ``task.directory``; returns one line on how to load the result.

        Raises `UnsupportedModelError` for a model that cannot be represented in the format, and `CheckpointError` where
        what was written gives other outputs than the model.
        """
        raise NotImplementedError
