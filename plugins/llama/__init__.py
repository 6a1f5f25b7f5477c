"""LLaMA: Hugging Face checkpoints with any number of KV heads, and Meta's official format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, FilePath

from llmpruner import (
    CheckpointReader,
    ComponentSettings,
    Exporter,
    ExportTask,
    ModelFamily,
    UnsupportedModelError,
    hookimpl,
    read_json,
)

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel


class LlamaFamily(ModelFamily):
    name = "llama"
    summary = "LLaMA 1, 2 and 3, and every model of their type"
    model_types = ("llama",)

    def refresh(self, model: PreTrainedModel) -> None:
        """Set the number of query heads per KV head, by which eager attention repeats keys."""
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features

    def stock_configs(self, config: PreTrainedConfig) -> Sequence[PreTrainedConfig]:
        """Mistral without a sliding window: as LLaMA, but the hidden size need not be a multiple of the heads."""
        from transformers import MistralConfig

        if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
            return ()
        skip = {"model_type", "architectures", "transformers_version", "attention_bias", "mlp_bias", "pretraining_tp"}
        values = {k: v for k, v in config.to_dict().items() if k not in skip}
        return [MistralConfig(**values, sliding_window=None, architectures=["MistralForCausalLM"])]


class MetaReader(CheckpointReader):
    name = "meta-llama"
    summary = "LLaMA 1, 2 and 3 as Meta publishes them: params.json and consolidated.NN.pth"
    family = "llama"

    def recognises(self, path: Path) -> bool:
        return any(path.glob("consolidated.*.pth")) and not (path / "config.json").exists()

    def read_config(self, path: Path) -> LlamaConfig:
        from .meta_format import MetaFolder, tokenizer_in

        return MetaFolder(path).config(tokenizer_in(path))

    def read_model(self, path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
        from .meta_format import model_in

        return model_in(path, dtype)

    def read_tokenizer(self, path: Path) -> Any | None:
        from .meta_format import tokenizer_in

        return tokenizer_in(path)


class MetaExporter(Exporter):
    """LLaMA in Meta's format, which can represent MLPs of the same pruned width and fewer layers, but not pruned
    attention or hidden channels, nor a vocabulary that lost tokens. Every tensor is read back and compared.

    Meta's own code scales rotary frequencies by a factor of 8 and ignores another one in ``params.json``, which
    llmpruner reads: for Llama 3.2 (32), it computes slightly different logits. The length of the context is not stored,
    because Meta's code takes it as an argument and refuses it in ``params.json``.
    """

    name = "meta"
    summary = "Meta's LLaMA format: params.json, consolidated.NN.pth and tokenizer.model"

    class Settings(ComponentSettings):
        shards: int = Field(1, ge=1, description="Number of consolidated.NN.pth files.")
        tokenizer: FilePath | None = Field(
            None, description="A tokenizer.model from elsewhere; by default the source's, if it has any."
        )

    settings: Settings

    def export(self, task: ExportTask) -> str:
        from .meta_format import META_FACTOR, check_written, write_meta

        record = task.source / "llmpruner.json"
        plans = read_json(record).get("plans", []) if record.is_file() else []
        if any("vocabulary" in plan["cuts"] for plan in plans):
            raise UnsupportedModelError(
                "Meta's format cannot hold this model: tokens were removed, and tokenizer.model has no form without "
                "them; export it --to stock or gguf"
            )
        shards = self.settings.shards
        cached = Path(str(getattr(task.loaded.tokenizer, "vocab_file", None)))  # of a hub model
        files = [file for file in (task.source / "tokenizer.model", cached) if file.name == "tokenizer.model"]
        tokenizer = self.settings.tokenizer or next(filter(Path.is_file, files), None)
        task.progress.status("Writing Meta's format")
        params = write_meta(task.model, tokenizer, task.directory, shards)
        task.progress.status("Reading it back")
        check_written(task.directory, task.model)
        line = f"Meta's llama code loads it with model-parallel size {shards}, and llmpruner does"
        factor, positions = params.rope_scaling_factor, task.model.config.max_position_embeddings
        if factor not in (None, META_FACTOR):
            line += f"; its rotary factor is {factor:g}, and Meta's code takes {META_FACTOR:g}"
        if positions != params.max_positions:
            line += f"; its context of {positions} tokens is not stored, and is read back as {params.max_positions}"
        if tokenizer is None:
            line += "; without tokenizer.model, as the source has none (--set meta.tokenizer=PATH)"
        return line


@hookimpl
def llmpruner_model_families() -> list[type]:
    return [LlamaFamily]


@hookimpl
def llmpruner_checkpoint_readers() -> list[type]:
    return [MetaReader]


@hookimpl
def llmpruner_exporters() -> list[type]:
    return [MetaExporter]
