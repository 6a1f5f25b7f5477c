"""A model of transformers without weights, which are read from files part by part.

A part is one decoder layer, or everything outside the layers. Loading is transformers' own, with everything on disk:
tensors that are in a safetensors file as the model has them stay there, and others (experts one by one, fused
projections, files of other formats) are converted one by one into a folder. The hooks by which accelerate then reads
the weights of single modules are replaced by reading whole parts, whose weights a stage can look at and change.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from ..errors import CheckpointError, first_line
from ..models.quiet import quiet_transformers
from .load import model_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LazyCheckpoint:
    """``model``: with parameters on the meta device, and buffers with their values. ``info``: the loading info of
    ``from_pretrained``.

    ``layers``: path of the decoder layers. Converted tensors are in a temporary folder in ``beside`` (None: where the
    system has such folders), which is removed with this object.
    """

    reads_ahead = True

    def __init__(
        self,
        directory: Path,
        dtype: torch.dtype,
        layers: str,
        beside: Path | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix=".llmpruner-converted-", dir=beside)
        with quiet_transformers():
            model, info = model_class(directory, trust_remote_code).from_pretrained(
                str(directory),
                dtype=dtype,
                device_map={"": "disk"},
                offload_folder=self._folder.name,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=trust_remote_code,
            )
        self.model: PreTrainedModel = model.eval()
        self.info: Mapping[str, Any] = info
        self._stored = _stored(model)
        remove_hook_from_submodules(model)
        vars(model).pop("hf_device_map", None)
        self._layers = layers
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        self._names: dict[int | None, list[str]] = {}
        for name, _ in model.named_parameters():
            self._names.setdefault(self.part_of(name), []).append(name)

    def part_of(self, name: str) -> int | None:
        """The part of a parameter."""
        prefix = f"{self._layers}."
        return int(name[len(prefix) :].split(".", 1)[0]) if name.startswith(prefix) else None

    def read(self, part: int | None) -> dict[str, torch.Tensor]:
        """Parameter → value, on the CPU, mapped from its file. Each call maps files anew, so that their pages stop
        counting as memory of the process when the tensors are freed. Changes in place do not reach the files. It may be
        called in another thread. Raises `CheckpointError` for a file that is damaged or gone."""
        try:
            return {name: self._stored[name] for name in self._names.get(part, ())}
        except Exception as error:  # safetensors and the system raise what they like
            raise CheckpointError(f"the weights of a layer cannot be read: {first_line(error)}") from error

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give parameters the values of `read`."""
        for name, tensor in tensors.items():
            self._set(name, nn.Parameter(tensor, requires_grad=False))
        if any(self.part_of(name) is None for name in tensors):
            self.model.tie_weights()

    def empty(self, part: int | None) -> None:
        """Free the parameters of ``part``: put them back on the meta device."""
        for name, parameter in self._empty.items():
            if self.part_of(name) == part:
                self._set(name, parameter)

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        path, _, leaf = name.rpartition(".")
        self.model.get_submodule(path)._parameters[leaf] = parameter


def _stored(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """accelerate's map from parameters to their values in files, which its hooks on ``model`` share."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            found = getattr(each, "weights_map", None)
            if found is not None:
                stored: Mapping[str, torch.Tensor] = getattr(found, "dataset", found)
                return stored
    raise CheckpointError("accelerate keeps none of this model's weights on disk")
