"""torchao: export with weights in 8 or 4 bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from llmpruner import (
    ComponentSettings,
    Exporter,
    ExportTask,
    MissingExtraError,
    SettingsError,
    UnsupportedModelError,
    hookimpl,
    read_json,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class TorchAoExporter(Exporter):
    """Rounds the weights of linear layers, except for the head, to integers. ``int8``: one scale per output channel,
    any width, any device. ``int4``: one scale and zero point per ``group`` of inputs, packed for the kernel that torch
    has for NVIDIA GPUs of compute capability 8.0 or newer, so that it must be exported with ``--device cuda``.

    The written checkpoint is loaded again, and must give the logits of the quantised model in memory. The line that is
    printed states bytes before and after; ``llmpruner evaluate`` with both checkpoints measures what rounding costs.
    """

    name = "torchao"
    summary = "weights in 8 or 4 bits (torchao), for transformers and vLLM"

    class Settings(ComponentSettings):
        scheme: Literal["int8", "int4"] = Field("int8", description="int8 or int4.")
        group: int = Field(128, ge=32, le=256, description="Inputs that share a scale in int4: 256, 128, 64 or 32.")

    settings: Settings

    def check(self) -> None:
        if find_spec("torchao") is None:
            raise MissingExtraError("torchao", "torchao")

    def export(self, task: ExportTask) -> str:
        """Raises `UnsupportedModelError` for a width that the kernel refuses, and `SettingsError` for a device or dtype
        that it does not have, before anything is written."""
        from llmpruner import load_pruned, save_checkpoint

        loaded, model = task.loaded, task.model
        if self.settings.scheme == "int4":
            self._check_int4(model)
        dense = task.directory / "dense"
        save_checkpoint(model, dense, record=None, tokenizer=loaded.tokenizer, family=loaded.family)
        before = _weight_bytes(dense)
        task.progress.status(f"Quantising to {self.settings.scheme}")
        quantised = self._quantised(dense, model)
        quantised.save_pretrained(task.directory)
        quantisation = read_json(task.directory / "config.json")["quantization_config"]
        # The rest of the files, and a configuration that states sizes under the names of other programs, too.
        shutil.copytree(dense, task.directory, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
        shutil.rmtree(dense)
        config = read_json(task.directory / "config.json") | {"quantization_config": quantisation}
        (task.directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        again = load_pruned(task.directory, dtype=model.dtype, device=model.device)
        task.check_logits(again, quantised)
        return (
            f"{before / 2**20:,.1f} MiB of weights became {_weight_bytes(task.directory) / 2**20:,.1f} MiB; "
            "AutoModelForCausalLM.from_pretrained loads it, with torchao installed"
        )

    def _check_int4(self, model: PreTrainedModel) -> None:
        import torch

        group = self.settings.group
        wrong = [(path, m.in_features) for path, m in linear_layers(model) if m.in_features % group]
        if wrong:
            raise UnsupportedModelError(
                f"int4 in groups of {group} needs input widths that are multiples of {group}, and '{wrong[0][0]}' has "
                f"{wrong[0][1]:,}; give a smaller torchao.group, prune with prune.round_to={group}, or export to int8"
            )
        if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < (8, 0):
            raise SettingsError(
                "torchao packs 4-bit weights only on NVIDIA GPUs of compute capability 8.0 or newer; give --device "
                "cuda, or --set torchao.scheme=int8"
            )
        if model.dtype != torch.bfloat16:
            raise SettingsError("torchao's int4 computes in bfloat16; give --dtype bfloat16")

    def _quantised(self, directory: Path, model: PreTrainedModel) -> PreTrainedModel:
        """The checkpoint in ``directory``, quantised while it is loaded."""
        from torch.utils._python_dispatch import is_traceable_wrapper_subclass
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
        from transformers import AutoModelForCausalLM, TorchAoConfig

        from llmpruner import register

        if self.settings.scheme == "int8":
            scheme: Any = Int8WeightOnlyConfig()
        else:
            scheme = Int4WeightOnlyConfig(group_size=self.settings.group, int4_packing_format="tile_packed_to_4d")
        register()
        quantised: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=model.dtype, quantization_config=TorchAoConfig(scheme), device_map={"": model.device}
        )
        for path, module in linear_layers(quantised):
            # torchao leaves a layer that it cannot quantise as it is, without an error.
            if not is_traceable_wrapper_subclass(module.weight):  # type: ignore[unreachable]
                raise UnsupportedModelError(f"torchao did not quantise '{path}' of shape {tuple(module.weight.shape)}")
        return quantised.eval()


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a model by path, without its head."""
    from torch import nn

    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield path, module


def _weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


@hookimpl
def llmpruner_exporters() -> list[type]:
    return [TorchAoExporter]
