"""Meta's official format as an exporter."""

from __future__ import annotations

from pydantic import Field, FilePath

from llmpruner import ComponentSettings, Exporter, ExportTask

from .meta_files import TOKENIZER


class MetaExporter(Exporter):
    """LLaMA in Meta's format, with one shard in memory at a time. The format can represent MLPs of one pruned width and
    fewer layers, but not pruned attention or hidden channels.

    Meta's own code has one factor for scaled rotary frequencies, 8, and ignores others in ``params.json``, which
    llmpruner reads: of models with another (Llama 3.2 has 32), it computes slightly different logits. The length of the
    context is not stored, because Meta's code takes it as an argument and refuses it in ``params.json``.
    """

    name = "meta"
    summary = "Meta's LLaMA format: params.json, consolidated.NN.pth and tokenizer.model"

    class Settings(ComponentSettings):
        shards: int = Field(1, ge=1, description="Number of consolidated.NN.pth files.")
        tokenizer: FilePath | None = Field(
            None, description="A tokenizer.model from elsewhere; by default the source's, where it has one."
        )

    settings: Settings

    def export(self, task: ExportTask) -> str:
        from .meta_check import write_and_check

        shards, own = self.settings.shards, task.source / TOKENIZER
        tokenizer = self.settings.tokenizer or (own if own.is_file() else None)
        lost = "".join(f"; {remark}" for remark in write_and_check(task, shards, tokenizer))
        bare = "" if tokenizer else f"; without {TOKENIZER}, as the source has none (--set meta.tokenizer=PATH)"
        return f"Meta's llama code loads it with model-parallel size {shards}, and llmpruner does{lost}{bare}"
