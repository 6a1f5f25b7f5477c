"""A model of transformers without weights, which are read from its safetensors files part by part.

A part is one decoder layer, or everything outside the layers. Names and layouts in the files may differ from those of
the model (experts one by one, fused projections); transformers' own conversions are applied to each part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from ..errors import CheckpointError, first_line
from ..models.empty import meta_model
from ..models.quiet import quiet_transformers
from .shards import ShardFiles

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class LazyCheckpoint:
    """``model``: of ``config``, in ``dtype``, with parameters on the meta device and buffers with their values.

    ``layers``: path of its decoder layers. A part is the number of a layer, or None for everything outside them.
    ``info``: ``missing_keys``, ``mismatched_keys`` and ``unexpected_keys``, as in the loading info of
    ``from_pretrained``; found from the names and shapes in the files. Raises `CheckpointError` for damaged files.
    """

    reads_ahead = True

    def __init__(self, directory: Path, config: PreTrainedConfig, dtype: torch.dtype, layers: str) -> None:
        self.files = ShardFiles(directory)
        self.model: PreTrainedModel = meta_model(config, dtype)
        self.model.config.name_or_path = str(directory)
        # Many checkpoints have no generation configuration.
        with contextlib.suppress(OSError), quiet_transformers():
            self.model.generation_config = GenerationConfig.from_pretrained(directory)
        self._mapping = get_model_conversion_mapping(self.model)
        self._options = LoadStateDictConfig(
            dtype=dtype, dtype_plan=self.model._get_dtype_plan(dtype), weight_mapping=self._mapping
        )
        self._layers = layers
        self._empty = dict(self.model.named_parameters(remove_duplicate=False))
        self._state = self.model.state_dict(keep_vars=True)
        self.info = self._assign()

    def part_of(self, name: str) -> int | None:
        """The part of a parameter or buffer of the model."""
        prefix = f"{self._layers}."
        return int(name[len(prefix) :].split(".", 1)[0]) if name.startswith(prefix) else None

    def read(self, part: int | None) -> dict[str, torch.Tensor]:
        """The tensors of ``part`` as they are in the files. It may be called in another thread than `fill`."""
        return self.files.read(self._sources.get(part, ()))

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give parameters and persistent buffers the values of `read`, in the dtype of the model."""
        if not self._options.dtype_plan and all(source in self._plain for source in tensors):
            # The same as below, without its search for names, which takes long for small parts.
            for source, tensor in tensors.items():
                self._set(self._plain[source], tensor)
        else:
            self._convert(tensors)
        if not tensors.keys().isdisjoint(self._sources.get(None, ())):
            self.model.tie_weights()

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        old = module._parameters.get(leaf)
        if old is None:
            module._buffers[leaf] = tensor.to(self._state[name].dtype)
        else:
            module._parameters[leaf] = nn.Parameter(tensor.to(self._state[name].dtype), requires_grad=False)

    def _convert(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), self._options)
        for error in info.conversion_errors.values():
            raise CheckpointError(f"the weights in {self.files.directory} cannot be converted: {first_line(error)}")
        for name, found, expected in info.mismatched_keys:
            raise CheckpointError(
                f"{self.files.directory} has {name} of shape {tuple(found)}; its configuration gives {tuple(expected)}"
            )

    def empty(self, part: int | None) -> None:
        """Free the parameters of ``part``: put them back on the meta device."""
        for name, parameter in self._empty.items():
            if self.part_of(name) == part:
                path, _, leaf = name.rpartition(".")
                self.model.get_submodule(path)._parameters[leaf] = parameter

    def _assign(self) -> dict[str, Any]:
        """Sort the names in the files into parts, and compare them with those of the model."""
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        state = self._state
        self._plain: dict[str, str] = {}
        self._sources: dict[int | None, list[str]] = {}
        missing = set(state)
        mismatched: set[tuple[str, Any, Any]] = set()
        unexpected: set[str] = set()
        for source in sorted(self.files.files):
            target, pattern = rename_source_key(source, renamings, converters, self.model.base_model_prefix, state)
            if target not in state and source in state:
                target, pattern = source, None
            if target not in state:
                unexpected.add(target)
                continue
            self._sources.setdefault(self.part_of(target), []).append(source)
            if pattern is not None:
                first, *others = next(c.target_patterns for c in converters if pattern in c.source_patterns)
                missing -= {target, *(target.replace(first, other) for other in others)}
                continue
            self._plain[source] = target
            missing.discard(target)
            if (shape := self.files.shape(source)) != tuple(state[target].shape):
                mismatched.add((target, shape, tuple(state[target].shape)))
        tied = getattr(self.model, "all_tied_weights_keys", {})
        missing -= {name for name, stored in tied.items() if stored not in missing}
        info = _Info(missing, mismatched, unexpected)
        self.model._adjust_missing_and_unexpected_keys(info)
        return vars(info)


class _Info:
    """The part of transformers' loading info that it adjusts by the rules of a model class."""

    def __init__(self, missing: set[str], mismatched: set[tuple[str, Any, Any]], unexpected: set[str]) -> None:
        self.missing_keys, self.mismatched_keys, self.unexpected_keys = missing, mismatched, unexpected
