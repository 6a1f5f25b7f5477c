"""Export as an ordinary transformers checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import CheckpointError, UnsupportedModelError
from .base import Exporter, ExportTask
from .origin import origin_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from transformers import PreTrainedModel

    from .padded import Padded


class StockExporter(Exporter):
    """For models in other formats (GGUF, Meta's, adapters on a base model), and pruned ones. Where no configuration of
    transformers describes the widths of a pruned model, its layers are padded with zeros to the widest of them, so that
    outputs are equal; the line that is returned says what that costs. Raises `UnsupportedModelError` where zeros cannot
    pad (experts, units under a norm)."""

    name = "stock"
    summary = "a checkpoint that transformers alone loads: config.json and safetensors, in a stock model class"
    takes_files = True
    keeps_dtype = True

    def export(self, task: ExportTask) -> str:
        from ..models import checkpoint, record, save

        model, note = task.model, ""
        padded: Padded | None = None
        try:
            self._write(task, model, task.loaded.record)
        except UnsupportedModelError:
            if not task.loaded.plans:
                raise
            padded = self._write_padded(task)
            if padded is None:
                raise
            note = f"; {padded.cost}"
        if not (task.directory / record.RECORD_FILE).is_file():
            # For transformers, and for llmpruner too, the result is a dense model.
            record.write_origin(task.directory, origin_of(task, padded))
        task.progress.status("Comparing the outputs of the written checkpoint")
        again = checkpoint.load_pruned(task.directory, dtype=model.dtype, device=model.device)
        if not save.gives_logits(save.dummy_logits(model), again):
            raise CheckpointError(f"the checkpoint written from {task.source} gives other outputs than the model")
        return f"{type(again).__name__} of transformers loads it: AutoModelForCausalLM.from_pretrained{note}"

    def _write_padded(self, task: ExportTask) -> Padded | None:
        """Write the first padded form that a configuration describes; None if none does."""
        from .padded import padded_forms

        task.progress.status("Padding all layers to one width")
        for form in padded_forms(task.loaded):
            try:
                # A record would state the widths before padding.
                self._write(task, form.model, None)
            except UnsupportedModelError:
                continue
            return form
        return None

    def _write(self, task: ExportTask, model: PreTrainedModel, record: Mapping[str, Any] | None) -> None:
        from ..models import save

        # `save_checkpoint` creates its directory.
        written = task.directory / "stock"
        save.save_checkpoint(
            model,
            written,
            record=record,
            tokenizer=task.loaded.tokenizer,
            family=task.loaded.family,
            extra_files=save.vocabulary_files(task.loaded.tokenizer),
            stock_only=True,
        )
        for file in written.iterdir():
            file.rename(task.directory / file.name)
        written.rmdir()
