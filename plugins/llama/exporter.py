"""Meta's official format as an exporter."""

from __future__ import annotations

from pydantic import Field, FilePath

from llmpruner import ComponentSettings, Exporter, ExportTask

from .meta_files import TOKENIZER


class MetaExporter(Exporter):
    """LLaMA in Meta's format, with one shard in memory at a time. The format can represent MLPs of one pruned width and
    fewer layers, but not pruned attention or hidden channels.

    Meta's own code has one factor for scaled rotary frequencies, 8, and ignores others in ``params.json``, which
    llmpruner reads: of models with another (Llama 3.2 has 32), it computes slightly different logits.
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
        from .meta_params import META_FACTOR

        shards, own = self.settings.shards, task.source / TOKENIZER
        tokenizer = self.settings.tokenizer or (own if own.is_file() else None)
        factor = write_and_check(task, shards, tokenizer).rope_scaling_factor
        bare = "" if tokenizer else f"; without {TOKENIZER}, as the source has none (--set meta.tokenizer=PATH)"
        other = "" if factor in (None, META_FACTOR) else f"; Meta's code has rotary factor 8, the model has {factor:g}"
        return f"Meta's llama code loads it with model-parallel size {shards}, and llmpruner does{other}{bare}"
