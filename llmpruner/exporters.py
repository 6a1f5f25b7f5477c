"""Export: a checkpoint in another format, checked against its source, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from .component import Component
from .errors import CheckpointError, PluginError
from .files import new_directory
from .progress import QUIET, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .models.model import Model


@dataclass(frozen=True)
class ExportTask:
    """``source``: the model as the user named it. ``directory``: new and empty; it gets its final name when
    `Exporter.export` returns. ``load``: called once, when the model is first needed."""

    source: Path
    directory: Path
    load: Callable[[], Model]
    progress: Progress = QUIET

    @property
    def name(self) -> str:
        """The name of the model's folder or file."""
        return self.source.resolve().name.removesuffix(".gguf")

    @cached_property
    def loaded(self) -> Model:
        """The checkpoint with its weights; ``config`` is that of the dense model."""
        return self.load()

    @property
    def model(self) -> PreTrainedModel:
        """In evaluation mode."""
        return self.loaded.network

    def save_tokenizer(self) -> None:
        """Write the tokenizer and the generation settings into `directory`."""
        from .models import save

        tokenizer, generation = self.loaded.tokenizer, save.valid_generation_config(self.model)
        if generation is not None:
            generation.save_pretrained(self.directory)
        if tokenizer is not None:
            save.save_tokenizer(tokenizer, self.directory)

    def check_logits(self, written: PreTrainedModel, expected: PreTrainedModel | None = None) -> None:
        """Raise `CheckpointError` unless ``written`` gives the logits of ``expected``, by default of `model`."""
        from .models import save

        self.progress.status("Comparing the outputs of the written checkpoint")
        if not save.gives_logits(save.dummy_logits(self.model if expected is None else expected), written):
            raise CheckpointError(f"the checkpoint written from {self.source} gives other outputs than the model")


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
    hook: ClassVar[str] = "llmpruner_exporters"
    for_other_programs: ClassVar[bool] = False
    """Whether llmpruner can't open what is written."""

    def check(self) -> None:
        """Raise `MissingExtraError` or `SettingsError` before the model is loaded. Checks nothing by default."""

    def export(self, task: ExportTask) -> str:
        """Write into ``task.directory``; returns one line on how to load the result. Raises `UnsupportedModelError` for
        a model that the format can't represent, and `CheckpointError` when the result gives other outputs."""
        raise NotImplementedError


def export(
    source: Path, exporter: Exporter, directory: Path, load: Callable[[], Model], progress: Progress = QUIET
) -> str:
    """Write the model ``source`` to the new ``directory``; returns a line on how to load it. No files remain when it
    raises: `OutputError` for ``directory``, `PluginError` when nothing was written, and what the exporter raises."""
    from . import __version__
    from .models.messages import quiet_transformers
    from .models.record import ORIGIN_FILE, RECORD_FILE, write_record

    exporter.check()
    with new_directory(directory) as partial, quiet_transformers():
        task = ExportTask(source, partial, load, progress)
        line = exporter.export(task)
        if not any(partial.iterdir()):
            raise PluginError(f"{exporter.label()} wrote no file")
        if (partial / "config.json").is_file():
            # Both records have the hash of every file.
            if exporter.for_other_programs or task.loaded.record is None:
                origin = {"llmpruner": __version__, "exported_from": str(source)}
                form = {"format": exporter.name} if exporter.for_other_programs else {}
                write_record(partial / ORIGIN_FILE, origin | form)
            else:
                write_record(partial / RECORD_FILE, task.loaded.record)
    return line


class StockExporter(Exporter):
    """For models in other formats. Raises `UnsupportedModelError` for a model whose layers have different widths."""

    name = "stock"
    summary = "a checkpoint that transformers alone loads: config.json and safetensors, in a stock model class"

    def export(self, task: ExportTask) -> str:
        from .models import save
        from .models.opening import load_pruned

        model = task.model
        tokenizer, family = task.loaded.tokenizer, task.loaded.family
        save.save_checkpoint(model, task.directory, record=None, tokenizer=tokenizer, family=family, stock_only=True)
        again = load_pruned(task.directory, dtype=model.dtype, device=model.device)
        task.check_logits(again)
        return f"{type(again).__name__} of transformers loads it: AutoModelForCausalLM.from_pretrained"
