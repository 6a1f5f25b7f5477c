"""The weights of a model: in memory, or read layer by layer from the safetensors files of a checkpoint.

Look at values only inside `Weights.layer` or `Weights.outside`. A layer, or the whole model, runs anywhere: weights are
read when a layer is called. A *part* is the number of a decoder layer, or None for everything outside the layers.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..structure.coupling import CouplingGraph, in_layer, layer_number
from ..structure.kept import Kept, layer_numbers
from .devices import multiplies_bfloat16_fast
from .record import names_in
from .surgery import CutValues


class Weights:
    """The weights of a model that is in memory. ``path``: of its module list of decoder layers."""

    streamed = False
    """Whether weights are read part by part; then values are there only inside `layer` and `outside`."""

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        self.model, self.path = model, path
        self.device: torch.device = model.device
        self._narrow = False

    def part(self, number: int | None) -> contextlib.AbstractContextManager[None]:
        """While active, the parameters of a part have their values. Changes in place last only if `keep` is called."""
        return contextlib.nullcontext()

    def layer(self, number: int) -> contextlib.AbstractContextManager[None]:
        return self.part(number)

    def outside(self) -> contextlib.AbstractContextManager[None]:
        return self.part(None)

    def like(self, model: PreTrainedModel) -> Weights:
        """The same weights for another model, which has them already, or is on the meta device if they are streamed."""
        return Weights(model, self.path)

    def number(self, name: str) -> int | None:
        """The number of the layer that a parameter is in; None outside the layers."""
        return layer_number(name, self.path)

    def keep(self, names: Collection[str], file: Path, *, used: bool = True) -> None:
        """Write the values of parameters, which were changed in place, to ``file``. ``used``: from now on, too."""
        tensors = {name: self.model.get_parameter(name).detach().contiguous() for name in sorted(names)}
        aside = file.with_suffix(".partial")
        save_file(tensors, aside)
        aside.replace(file)

    @contextlib.contextmanager
    def in_bfloat16(self) -> Iterator[None]:
        """While active, parameters are in bfloat16 if the device multiplies faster so: for text that the model writes,
        where weights would else be converted for each token."""
        faster = self.model.dtype == torch.float32 and multiplies_bfloat16_fast(self.device.type)
        parameters = list(self.model.parameters()) if faster else []
        exact = [parameter.data for parameter in parameters]
        self._narrow = bool(parameters)
        try:
            for parameter in parameters:
                parameter.data = parameter.data.to(torch.bfloat16)
            yield
        finally:
            self._narrow = False
            for parameter, data in zip(parameters, exact, strict=True):
                parameter.data = data

    def use(self, file: Path) -> None:
        """Use the values that `keep` wrote to ``file``."""
        for name, tensor in load_file(file).items():
            self.model.get_parameter(name).data.copy_(tensor)


class StreamedWeights(Weights):
    """Weights that `read` gives part by part. ``model``: on the meta device. ``device``: of the computation."""

    streamed = True

    def __init__(self, model: PreTrainedModel, path: str, device: torch.device) -> None:
        super().__init__(model, path)
        self.device = device
        self._users: Counter[int | None] = Counter()
        self._kept: dict[int | None, Path] = {}
        self._meta: dict[int | None, dict[str, nn.Parameter]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._meta.setdefault(self.number(name), {})[name] = parameter
        self._names: dict[int | None, list[str]] = {}  # of tied parameters, the first
        for name, _ in model.named_parameters():
            self._names.setdefault(self.number(name), []).append(name)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer if buffer.is_meta else buffer.to(device)
        layers: Any = model.get_submodule(path)
        self.numbers: list[int | None] = [None, *range(len(layers))]
        """All parts."""
        for number, layer in enumerate(layers):
            layer.forward = self._reading(number, layer.forward)
        model.register_forward_pre_hook(lambda *_: self._enter(None))
        model.register_forward_hook(lambda *_: self._leave(None), always_call=True)

    def read(self, part: int | None) -> dict[str, torch.Tensor]:
        """Parameter or buffer → its value, on the CPU. Raises `CheckpointError` for files that are damaged or gone."""
        raise NotImplementedError

    @contextlib.contextmanager
    def part(self, number: int | None) -> Iterator[None]:
        try:
            self._enter(number)
            yield
        finally:
            self._leave(number)

    def keep(self, names: Collection[str], file: Path, *, used: bool = True) -> None:
        super().keep(names, file)
        if used:
            self._kept[self.number(next(iter(names)))] = file

    def use(self, file: Path) -> None:
        self._kept[self.number(names_in(file)[0])] = file

    def like(self, model: PreTrainedModel) -> StreamedWeights:
        return DerivedWeights(model, self)

    def _reading(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def read_and_run(*args: Any, **kwargs: Any) -> Any:
            with self.part(number):
                return forward(*args, **kwargs)

        return read_and_run

    def _enter(self, part: int | None) -> None:
        self._users[part] += 1
        if self._users[part] > 1:
            return
        for name, tensor in self.read(part).items():
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            value, is_buffer = tensor.to(self.device), leaf in module._buffers
            if self._narrow and not is_buffer:
                value = value.to(torch.bfloat16)
            setattr(module, leaf, value if is_buffer else nn.Parameter(value, requires_grad=False))
        if part is None:
            self.model.tie_weights()
        if part in self._kept:
            super().use(self._kept[part])
        for name in self._names.get(part, ()):
            self.model.get_parameter(name).requires_grad_(False)

    def _leave(self, part: int | None) -> None:
        self._users[part] -= 1
        if not self._users[part]:
            for name, parameter in self._meta[part].items():
                path, _, leaf = name.rpartition(".")
                self.model.get_submodule(path)._parameters[leaf] = parameter


class DerivedWeights(StreamedWeights):
    """The weights of ``source`` for another model. ``cut``: the graph of the source's model, and what is kept of it."""

    def __init__(
        self, model: PreTrainedModel, source: StreamedWeights, cut: tuple[CouplingGraph, Kept] | None = None
    ) -> None:
        super().__init__(model, source.path, source.device)
        self._source = source
        self._values = None if cut is None else CutValues(*cut)
        self._old: dict[int | None, int] = {} if cut is None else {n: old for old, n in layer_numbers(*cut).items()}

    def read(self, part: int | None) -> dict[str, torch.Tensor]:
        old, tensors = self._old.get(part, part), {}
        with self._source.part(old):
            for name, tensor in self._source.model.state_dict().items():
                if self._source.number(name) == old:
                    value = tensor if self._values is None else self._values.of(name, tensor)
                    tensors[in_layer(name, self.path, part)] = value
        return tensors
