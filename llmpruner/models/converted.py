"""Stored tensors as the parameters of a model, by transformers' own conversion, for one decoder layer at a time.

What a file stores is not always what the model has: names differ, experts are stored one by one, projections are fused.
`from_pretrained` converts all tensors of a checkpoint; the function in it that does so is called here with those of one
layer, on a second model whose parameters are on the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from ..errors import CheckpointError
from .empty import put_parameters
from .quiet import quiet_transformers

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


class StoredTensors(Protocol):
    """The tensors of a checkpoint as its files have them."""

    @property
    def targets(self) -> Mapping[str, str]:
        """Stored name → the parameter or buffer that it is part of, the first one of several."""
        ...

    def state(self, names: Collection[str]) -> Mapping[str, Any]:
        """The part of the state dict that `from_pretrained` would make of the tensors ``names``: a key → a tensor, or
        an object whose ``[...]`` is one. Raises `CheckpointError`."""
        ...


class Conversion:
    """transformers' conversion for ``model``, whose parameters are on the meta device, and which must not be the one
    that runs. ``dtype``: of the parameters. ``quantizer``: transformers' own, for a quantised format."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, quantizer: Any | None = None) -> None:
        self._model, self._quantizer = model, quantizer
        self._transforms = get_model_conversion_mapping(model, None, quantizer)
        self._options: dict[str, Any] = {"dtype": dtype, "dtype_plan": model._get_dtype_plan(dtype)}
        self._state = model.state_dict()
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        alike: dict[int, list[str]] = {}
        for name, tensor in self._empty.items():
            alike.setdefault(id(tensor), []).append(name)
        self._tied = {name: names for names in alike.values() for name in names}
        self.buffers = frozenset(name for name, _ in model.named_buffers() if name in self._state)
        """Names of the buffers that are stored."""

    def targets(self, stored: Iterable[str]) -> dict[str, str]:
        """Stored name → the parameter or buffer that it is part of, the first one of several; unknown names are those
        of nothing in the model."""
        # A transform keeps that it was used, and some change by it.
        transforms = copy.deepcopy(self._transforms)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        prefix = self._model.base_model_prefix
        return {name: rename_source_key(name, renamings, converters, prefix, self._state)[0] for name in stored}

    def tied_to(self, name: str) -> list[str]:
        """``name`` and the parameters that are tied to it."""
        return self._tied.get(name, [name])

    def missing(self, targets: Collection[str]) -> list[str]:
        """Parameters and buffers that neither they themselves nor what they are tied to is among ``targets``."""
        return sorted(name for name in self._state if not any(other in targets for other in self.tied_to(name)))

    def values(self, state: Mapping[str, Any], names: Collection[str]) -> dict[str, torch.Tensor]:
        """The parameters and buffers ``names``, of the tensors ``state`` that belong to them. Raises `CheckpointError`
        where one is missing or has another shape."""
        options = LoadStateDictConfig(
            weight_mapping=copy.deepcopy(self._transforms), hf_quantizer=self._quantizer, **self._options
        )  # fmt: skip
        try:
            with quiet_transformers():
                report, _ = convert_and_load_state_dict_in_model(self._model, dict(state), options)
            loaded = self._model.state_dict()
        finally:
            put_parameters(self._model, self._empty)
        for trouble in report.conversion_errors.values():
            raise CheckpointError(f"the stored tensors cannot be converted: {trouble}")
        for name, stored, expected in sorted(report.mismatched_keys):
            raise CheckpointError(f"'{name}' is stored with shape {tuple(stored)}, the model has {tuple(expected)}")
        found = {}
        for name in names:
            tensors = [loaded[other] for other in self.tied_to(name) if not loaded[other].is_meta]
            if not tensors:
                raise CheckpointError(f"no stored tensor gives '{name}'")
            found[name] = tensors[0]
        return found


class ConvertedTensors:
    """The `TensorSource` of ``stored`` tensors and their ``conversion``."""

    def __init__(self, stored: StoredTensors, conversion: Conversion) -> None:
        self._stored, self._conversion = stored, conversion
        self._of: dict[str, list[str]] = {}
        """Parameter or buffer → the stored tensors that it is made of."""
        for name, target in stored.targets.items():
            self._of.setdefault(target, []).append(name)

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        stored = {
            each: None
            for name in names
            for target in self._conversion.tied_to(name)
            for each in self._of.get(target, ())
        }
        return self._conversion.values(self._stored.state(stored), names)

    def give_buffers(self, model: nn.Module) -> None:
        """Give ``model`` the stored values of its buffers."""
        for name, value in self.read(self._conversion.buffers).items() if self._conversion.buffers else ():
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = value.clone()
