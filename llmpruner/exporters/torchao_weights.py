"""Export with weights in 8 or 4 bits, as torchao stores them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..component import ComponentSettings
from ..errors import CheckpointError, MissingExtraError, SettingsError, UnsupportedModelError
from .base import Exporter, ExportTask

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, TorchAoConfig

GROUPS = (256, 128, 64, 32)
"""Numbers of weights that torchao can give a scale of their own in 4 bits."""
_TOKENS = 512


class TorchAoExporter(Exporter):
    """Rounds the weights of linear layers, except for the head, to integers. ``int8``: one scale per output channel,
    any width, any device. ``int4``: one scale and zero point per ``group`` of inputs, packed for the kernel that torch
    has for NVIDIA GPUs of compute capability 8.0 or newer, so that it must be exported with ``--device cuda``.

    The written checkpoint is loaded again, and must give the logits of the quantised model in memory. The line that is
    printed states bytes before and after, and the KL divergence from the model before, on the first 512 tokens of
    Python's help topics (random tokens for a model without a tokenizer).
    """

    name = "torchao"
    summary = "weights in 8 or 4 bits (torchao), for transformers and vLLM"

    class Settings(ComponentSettings):
        scheme: Literal["int8", "int4"] = Field("int8", description="int8 or int4.")
        group: int | None = Field(
            None, description="Inputs that share a scale in int4: 256, 128, 64 or 32; 128 by default."
        )

    settings: Settings

    def check(self) -> None:
        if find_spec("torchao") is None:
            raise MissingExtraError("torchao", "torchao")
        self._check_settings()

    def export(self, task: ExportTask) -> str:
        """Raises `UnsupportedModelError` for a width that the kernel refuses, and `SettingsError` for a device or dtype
        that it does not have, before anything is written."""
        from ..models import save
        from ..models.checkpoint import load_pruned
        from ..models.numbers import stored_bytes

        self.check()
        loaded, model = task.loaded, task.model
        self._check_model(model)
        tokens, what = _tokens(model, loaded.tokenizer)
        expected = _logits(model, tokens)
        before = sum(map(stored_bytes, model.parameters()))
        dense = task.directory / "dense"
        save.save_checkpoint(model, dense, record=loaded.record, tokenizer=loaded.tokenizer, family=loaded.family)
        task.progress.status(f"Quantising to {self.settings.scheme}")
        quantised = _quantised(dense, model, self._config())
        self._check_complete(quantised)
        _save(quantised, dense, task.directory, save.vocabulary_files(loaded.tokenizer))
        task.progress.status("Comparing the outputs of the written checkpoint")
        again = load_pruned(task.directory, dtype=model.dtype, device=model.device)
        if not save.gives_logits(save.dummy_logits(quantised), again):
            raise CheckpointError(f"the checkpoint written from {task.source} gives other outputs than the model")
        return _line(before, sum(map(stored_bytes, again.parameters())), expected, _logits(again, tokens), what)

    def _check_settings(self) -> None:
        group = self.settings.group
        if group is not None and self.settings.scheme == "int8":
            raise SettingsError(
                "--set torchao.group has no effect with int8, which has a scale per output; leave it out"
            )
        if group is not None and group not in GROUPS:
            raise SettingsError(f"--set torchao.group={group}: expected one of {', '.join(map(str, GROUPS))}")

    def _check_model(self, model: PreTrainedModel) -> None:
        if self.settings.scheme == "int8":
            return
        import torch

        widths = {module.in_features: path for path, module in linear_layers(model)}
        wrong = [width for width in sorted(widths) if width % self._group]
        if wrong:
            raise UnsupportedModelError(
                f"int4 in groups of {self._group} needs input widths that are multiples of {self._group}, and "
                f"'{widths[wrong[0]]}' has {wrong[0]:,}; {self._remedy(model, widths, wrong)}"
            )
        if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < (8, 0):
            raise SettingsError(
                "torchao packs 4-bit weights on NVIDIA GPUs of compute capability 8.0 or newer alone; give --device "
                "cuda, or --set torchao.scheme=int8"
            )
        if model.dtype != torch.bfloat16:
            raise SettingsError("torchao's int4 computes in bfloat16; give --dtype bfloat16")

    def _remedy(self, model: PreTrainedModel, widths: Iterable[int], wrong: Sequence[int]) -> str:
        """What to do about input ``widths`` of which some are ``wrong``."""
        found = [f"give --set torchao.group={g}" for g in GROUPS if math.gcd(*widths) % g == 0][:1]
        if model.config.get_text_config().hidden_size not in wrong:
            found.append(f"prune with --round-to {self._group}")
        return ", or ".join([*found, "export to int8"])

    @property
    def _group(self) -> int:
        return self.settings.group or 128

    def _config(self) -> TorchAoConfig:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        if self.settings.scheme == "int8":
            return TorchAoConfig(Int8WeightOnlyConfig())
        return TorchAoConfig(Int4WeightOnlyConfig(group_size=self._group, int4_packing_format="tile_packed_to_4d"))

    def _check_complete(self, quantised: PreTrainedModel) -> None:
        """torchao leaves a layer that it cannot quantise as it is, without an error."""
        from ..models.numbers import stored_bytes

        for path, module in linear_layers(quantised):
            weight = module.weight
            if stored_bytes(weight) >= weight.numel() * weight.element_size():
                raise UnsupportedModelError(f"torchao did not quantise '{path}' of shape {tuple(weight.shape)}")


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a model by path, without its head."""
    from torch import nn

    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield path, module


def _quantised(directory: Path, model: PreTrainedModel, config: TorchAoConfig) -> PreTrainedModel:
    from ..models.checkpoint import model_class
    from ..models.messages import quiet_transformers

    with quiet_transformers():
        loaded: PreTrainedModel = model_class(directory, False).from_pretrained(
            str(directory), dtype=model.dtype, quantization_config=config, device_map={"": model.device}
        )
    return loaded.eval()


def _save(quantised: PreTrainedModel, dense: Path, directory: Path, vocabulary: list[Path]) -> None:
    """Write ``quantised`` to ``directory``, with what else is in ``dense``, which is removed."""
    from ..models.messages import quiet_transformers
    from ..models.record import add_manifest
    from ..models.save import add_earlier_names, valid_generation_config

    with quiet_transformers():
        quantised.generation_config = valid_generation_config(quantised)
        quantised.save_pretrained(directory)
    add_earlier_names(directory, quantised.config.attribute_map)
    for file in dense.iterdir():
        weights = file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json")
        if not weights and not (directory / file.name).exists():
            file.rename(directory / file.name)
    shutil.rmtree(dense)
    for file in vocabulary:
        shutil.copyfile(file, directory / file.name)
    add_manifest(directory)


def _tokens(model: PreTrainedModel, tokenizer: Any | None) -> tuple[torch.Tensor, str]:
    """Token ids of shape (1, T) to compare predictions on, and what they are."""
    import torch

    from ..calibration.documents import PYDOC, read_text
    from ..models.generation import sample_tokens
    from ..models.positions import positions_of

    count = min(_TOKENS, positions_of(model.config) or _TOKENS)
    if tokenizer is None:
        return sample_tokens(model, count), "random tokens"
    ids = tokenizer(read_text(PYDOC)[: 20 * count], add_special_tokens=False)["input_ids"][:count]
    return torch.tensor([ids]), "tokens of Python's help topics"


def _logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens.to(model.device), use_cache=False).logits
        return logits


def _line(before: int, after: int, expected: torch.Tensor, logits: torch.Tensor, what: str) -> str:
    from ..engine.divergence import divergence

    count = expected.shape[1]
    kl = divergence(expected, logits) / max(1, count - 1)
    return (
        f"{before / 2**20:,.1f} MiB of weights became {after / 2**20:,.1f} MiB; KL divergence from the model before: "
        f"{kl:.4f} nats per token on {count} {what}; AutoModelForCausalLM.from_pretrained loads it, with torchao "
        "installed"
    )
