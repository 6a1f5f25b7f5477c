"""Nemotron-NAS: LLaMA with a width of its own for every layer, as vLLM, SGLang and mlx-lm read it.

``config.json`` has for each layer the number of query heads per key/value head and a multiplier m from which readers
compute the MLP width: int(2·m·hidden/3), rounded up to a multiple of 256. The number of query heads is the same in all
layers. Layers are padded with zeros to what this can state.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pydantic import Field

from ..component import ComponentSettings
from .base import Exporter, ExportTask
from .origin import origin_of

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from .base import ExportSource
    from .blocks import Sizes


class NemotronNasExporter(Exporter):
    """LLaMA and Mistral whose layers have different widths, for runtimes that serve Nemotron-NAS. MLP widths become
    multiples of 256, and all layers get one number of query heads, by zeros that leave outputs equal; the line that is
    returned says what that costs. Raises `UnsupportedModelError` for other architectures, biases, and sliding windows.
    """

    name = "nemotron-nas"
    summary = "LLaMA with widths per layer (block_configs), for vLLM, SGLang and mlx-lm"
    keeps_dtype = True

    class Settings(ComponentSettings):
        equal_heads: bool = Field(
            False, description="One number of key/value heads for all layers, by zeros: SGLang needs it."
        )

    settings: Settings

    def export(self, task: ExportTask) -> str:
        from ..errors import CheckpointError
        from ..models import record, save
        from . import blocks

        source, model = task.loaded, task.model
        blocks.check(model)
        sizes = blocks.sizes_of(model)
        stated = blocks.stated(sizes, equal=self.settings.equal_heads)
        task.progress.status("Padding layers to the widths of the format")
        padded = blocks.padded(source, sizes, stated)
        self._write(task.directory, source, padded.model, stated)
        record.write_origin(task.directory, {**origin_of(task, padded), "format": self.name})
        task.progress.status("Comparing the outputs of the written checkpoint")
        if not save.gives_logits(save.dummy_logits(model), blocks.read(task.directory, model)):
            raise CheckpointError(f"the checkpoint written from {task.source} gives other outputs than the model")
        return f"vLLM loads it as DeciLMForCausalLM with --trust-remote-code{_others(stated)}; {padded.cost}"

    def _write(self, directory: Path, source: ExportSource, model: PreTrainedModel, sizes: Sizes) -> None:
        import shutil
        from pathlib import Path

        from huggingface_hub import save_torch_state_dict

        from ..models import save
        from . import blocks

        tied = model.config.tie_word_embeddings
        state = {n: t.contiguous() for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
        save_torch_state_dict(state, directory)
        config = blocks.configuration(model, sizes)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(Path(__file__).with_name(f"{blocks.CODE}.py"), directory / f"{blocks.CODE}.py")
        generation = save.valid_generation_config(model)
        if generation is not None:
            generation.save_pretrained(directory)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(directory)
        for file in save.vocabulary_files(source.tokenizer):
            shutil.copyfile(file, directory / file.name)


def _others(sizes: Sizes) -> str:
    """Which other programs read a model of these sizes."""
    names = ["SGLang"] * sizes.equal_heads + ["mlx-lm"] * sizes.fills_hidden
    return f", and {' and '.join(names)} read{'s' * (len(names) == 1)} it" if names else ""
