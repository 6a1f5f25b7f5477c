"""The tensors of a GGUF file, dequantised when they are read, with transformers' names and order of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GgufConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    read_field,
)
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from .computed_once import ComputedOnce
from .converted import Conversion, ConvertedTensors
from .empty import meta_model
from .gguf import gguf_metadata, gguf_reader
from .lazy import LazyModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_AT_ONCE = 1 << 22
"""Values that are dequantised at once, in whole rows: gguf's own function holds several arrays of them."""


def lazy_gguf(
    file: Path, config: PreTrainedConfig, dtype: torch.dtype, layers: str, once: Path | None = None
) -> LazyModel:
    """The model in a GGUF file. ``config``: as transformers reads it of the file. ``layers``: path of the decoder
    layers. ``once``: a folder in which the values are kept in a temporary folder after they were computed; None:
    they are computed whenever they are read. Raises what gguf and transformers raise."""
    model, shell = meta_model(config, dtype), meta_model(config, dtype)
    quantizer = _quantizer(file, shell, dtype)
    conversion = Conversion(shell, dtype, quantizer)
    stored: _DequantisedTensors | _BlockTensors = (
        _DequantisedTensors(file, shell, dtype)
        if quantizer is None
        else _BlockTensors(file, shell, quantizer, conversion)
    )
    source = ConvertedTensors(stored, conversion)
    info = {
        "missing_keys": conversion.missing(set(stored.targets.values())),
        "mismatched_keys": _of_other_sizes(stored, shell),
        "unexpected_keys": (),
    }
    if not info["missing_keys"]:
        source.give_buffers(model)
    return LazyModel(model, source if once is None else ComputedOnce(source, once), layers, info)


def _of_other_sizes(stored: _DequantisedTensors | _BlockTensors, model: PreTrainedModel) -> list[str]:
    """Parameters with another number of values than the tensors that they are made of; these may be permuted."""
    found = Counter[str]()
    for name, target in stored.targets.items():
        found[target] += stored.elements[name]
    return sorted(
        name for name, tensor in model.state_dict().items() if name in found and found[name] != tensor.numel()
    )


@dataclass(frozen=True)
class _Place:
    """``kind``: gguf's type of the tensor. ``offset``: of its first byte in the file. ``shape`` and ``dtype``: of the
    stored numbers, which are bytes for a quantised tensor."""

    kind: Any
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class _DequantisedTensors:
    """The `StoredTensors` of a file whose architecture transformers reads with one function for all tensors, which
    dequantises them before anything else; its steps are done here for those that are needed."""

    def __init__(self, file: Path, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._file, self._dtype = file, dtype
        reader, config = gguf_reader(file), gguf_metadata(file)["config"]
        processor = TENSOR_PROCESSORS.get(read_field(reader, "general.architecture")[0], TensorProcessor)
        self._processor = processor(config=config)
        self._names: Mapping[str, str] = get_gguf_hf_weights_map(model, self._processor)
        self._places = {
            each.name: _Place(each.tensor_type, int(each.data_offset), tuple(each.data.shape), each.data.dtype)
            for each in reader.tensors
        }
        self.elements = {each.name: int(each.n_elements) for each in reader.tensors}
        # Stacked experts have names without a suffix in transformers.
        named = {name: self._names.get(name, self._names.get(name.removesuffix(".weight"))) for name in self._places}
        self.targets: Mapping[str, str] = {name: target for name, target in named.items() if target is not None}

    def state(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name in names:
            values = dequantised(self._file, self._places[name])
            done = self._processor.process(
                values, name, tensor_key_mapping=self._names, parsed_parameters={"tensors": found}
            )
            if done.name in self._names:
                # With the order of axes in memory, as transformers copies it: products depend on it.
                array = done.weights if done.weights is values else np.copy(done.weights)
                found[self._names[done.name]] = torch.from_numpy(array).to(self._dtype)
        return found


def dequantised(file: Path, place: _Place) -> np.ndarray[Any, Any]:
    """A tensor in float32, in memory of its own."""
    import gguf

    stored = np.memmap(file, mode="r", dtype=place.dtype, offset=place.offset, shape=place.shape)
    rows = stored.reshape(-1, place.shape[-1])
    first = gguf.dequantize(rows[:1], place.kind)
    values = np.empty((len(rows), first.shape[-1]), dtype=first.dtype)
    step = max(1, _AT_ONCE // values.shape[-1])
    for start in range(0, len(rows), step):
        values[start : start + step] = gguf.dequantize(rows[start : start + step], place.kind)
    return values.reshape(*place.shape[:-1], values.shape[-1])


def dequantisation_rate(file: Path) -> float:
    """Values per second, measured on some rows of the largest tensor."""
    import gguf

    largest = max(gguf_reader(file).tensors, key=lambda tensor: int(tensor.n_elements))
    rows = largest.data.reshape(-1, largest.data.shape[-1])
    some = rows[: max(1, _AT_ONCE // 4 * len(rows) // int(largest.n_elements))]
    gguf.dequantize(some[:1], largest.tensor_type)
    started = perf_counter()
    values = np.copy(gguf.dequantize(some, largest.tensor_type))
    return values.size / (perf_counter() - started)


def _quantizer(file: Path, model: PreTrainedModel, dtype: torch.dtype) -> Any | None:
    """transformers' quantizer for the file, ready to convert tensors to ``dtype``; None for an architecture that it
    reads with one function for all tensors."""
    quantizer = GgufHfQuantizer(GgufConfig(gguf_file=str(file), dequantize=True))
    quantizer.read_header(str(file))
    if not quantizer.supported:
        return None
    quantizer.update_dtype(dtype)
    quantizer._process_model_before_weight_loading(model)
    return quantizer


class _BlockTensors:
    """The `StoredTensors` of a file whose architecture transformers converts as it does other checkpoints, blocks of
    integers included."""

    def __init__(self, file: Path, model: PreTrainedModel, quantizer: Any, conversion: Conversion) -> None:
        self._file, self._model, self._quantizer = file, model, quantizer
        self.elements = {each.name: prod(each.shape) for each in quantizer.header.tensors}
        self.targets: Mapping[str, str] = conversion.targets(self.elements)

    def state(self, names: Collection[str]) -> dict[str, Any]:
        # Each call maps the file anew.
        tensors = self._quantizer.get_state_dict(str(self._file), self._model)
        return {name: tensors[name] for name in names}
