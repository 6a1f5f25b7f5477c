"""Meta's official format as an exporter."""

from __future__ import annotations

from pydantic import Field, FilePath

from llmpruner import ComponentSettings, Exporter, ExportTask


class MetaExporter(Exporter):
    """LLaMA in Meta's format, streamed from the source: one shard is in memory at a time. MLPs of one width and removed
    layers fit; attention and the residual stream must be whole."""

    name = "meta"
    summary = "Meta's LLaMA format: params.json, consolidated.NN.pth and tokenizer.model"

    class Settings(ComponentSettings):
        shards: int = Field(1, ge=1, description="Number of consolidated.NN.pth files.")
        tokenizer: FilePath | None = Field(
            None, description="A tokenizer.model from elsewhere; by default the source's, where it has one."
        )

    settings: Settings

    def export(self, task: ExportTask) -> str:
        from .meta_check import check_written
        from .meta_tokenizer import TOKENIZER
        from .meta_writer import meta_params, open_source, write_files

        shards = self.settings.shards
        tensors, config = open_source(task.source)
        params = meta_params(tensors, config, shards)
        own = task.source / TOKENIZER
        tokenizer = self.settings.tokenizer or (own if own.is_file() else None)
        task.progress.status("Writing Meta's format")
        write_files(tensors, params, task.directory, shards, tokenizer)
        task.progress.status("Reading it back")
        check_written(task.directory, tensors, config)
        bare = "" if tokenizer else f"; without {TOKENIZER}, as the source has none (--set meta.tokenizer=PATH)"
        return f"Meta's llama code loads it with model-parallel size {shards}, and llmpruner does{bare}"
