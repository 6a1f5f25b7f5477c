"""Export as an ordinary transformers checkpoint."""

from __future__ import annotations

from ..errors import CheckpointError
from .base import Exporter, ExportTask


class StockExporter(Exporter):
    """For models in other formats (GGUF, Meta's, adapters on a base model), and pruned ones whose layers have one
    width. Raises `UnsupportedModelError` for a pruned model of different widths per layer."""

    name = "stock"
    summary = "a checkpoint that transformers alone loads: config.json and safetensors, in a stock model class"

    def export(self, task: ExportTask) -> str:
        from ..checkpoints import load, save

        loaded, model = task.loaded, task.model
        # `save_checkpoint` creates its directory.
        written = task.directory / "stock"
        save.save_checkpoint(
            model,
            written,
            record=loaded.record,
            tokenizer=loaded.tokenizer,
            family=loaded.family,
            extra_files=save.vocabulary_files(loaded.tokenizer),
            stock_only=True,
        )
        for file in written.iterdir():
            file.rename(task.directory / file.name)
        written.rmdir()
        task.progress.status("Comparing the outputs of the written checkpoint")
        again = load.load_pruned(task.directory, dtype=model.dtype, device=model.device)
        if not save.gives_logits(save.dummy_logits(model), again):
            raise CheckpointError(f"the checkpoint written from {task.source} gives other outputs than the model")
        return f"{type(again).__name__} of transformers loads it: AutoModelForCausalLM.from_pretrained"
